"""ImageReward against the published package, on small weights of the released layout."""

from dataclasses import replace

import pytest
import torch

from grpo.config import UserError
from grpo.models import ClassCondition
from grpo.rewards import DecodedBatch
from grpo.rewards.image_reward import ImageReward, load_image_reward
from tests.rewards.published_layouts import counted, images

pytest.importorskip("timm", reason="the extra [rewards] is not installed")
pytest.importorskip("transformers", reason="the extra [rewards] is not installed")

WORDS = 200
RECORDED = [-0.2208998054265976, -0.2240835279226303]
"""By image-reward 1.5 with timm 0.6.13 and transformers 4.30.2, fp32, for the tokens 101 7 8 9 102 and 101 50 102."""


def released():
    """Weights with the names of a released file: a vision transformer of width 64, a text encoder of width 128."""
    layers = {"blip.visual_encoder.patch_embed.proj": (64, 3, 16, 16), "blip.visual_encoder.norm": (64,)}
    tables = {"blip.visual_encoder.cls_token": (1, 1, 64), "blip.visual_encoder.pos_embed": (1, 197, 64)}
    layers |= {"blip.vision_proj": (256, 64), "blip.text_proj": (256, 128)}
    for i in (0, 1):
        block = f"blip.visual_encoder.blocks.{i}"
        layers |= {f"{block}.attn.qkv": (192, 64), f"{block}.attn.proj": (64, 64)}
        layers |= {f"{block}.mlp.fc1": (256, 64), f"{block}.mlp.fc2": (64, 256)}
        layers |= {f"{block}.norm1": (64,), f"{block}.norm2": (64,)}
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, width in ("attention", 128), ("crossattention", 64):
            layers |= {f"{layer}.{attention}.self.{part}": (128, width) for part in ("key", "value")}
            layers |= {f"{layer}.{attention}.{part}": (128, 128) for part in ("self.query", "output.dense")}
            layers[f"{layer}.{attention}.output.LayerNorm"] = (128,)
        layers |= {f"{layer}.intermediate.dense": (96, 128), f"{layer}.output.dense": (128, 96)}
        layers[f"{layer}.output.LayerNorm"] = (128,)
    embeddings = "blip.text_encoder.embeddings"
    tables |= {f"{embeddings}.word_embeddings.weight": (WORDS, 128)}
    tables |= {f"{embeddings}.position_embeddings.weight": (64, 128)}
    layers[f"{embeddings}.LayerNorm"] = (128,)
    widths = (128, 1024, 128, 64, 16, 1)
    layers |= {f"mlp.layers.{place}": (widths[i + 1], widths[i]) for i, place in enumerate((0, 2, 4, 6, 7))}
    weights = {f"{name}.weight": shape for name, shape in layers.items()} | tables
    weights |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return counted(weights) | {f"{embeddings}.position_ids": torch.arange(64)[None]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(released(), folder / "ImageReward.pt")
    words = [f"w{i}" for i in range(WORDS)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return {"checkpoint": str(folder / "ImageReward.pt"), "tokenizer": str(folder)}


@pytest.fixture
def batch():
    texts, image_of = ["W7 w8  w9", "w50"], torch.arange(2)
    return DecodedBatch(images(2, 224) / 127.5 - 1, torch.zeros(2, 16), ClassCondition(image_of), None, image_of, texts)


def make(context, files, **settings):
    return ImageReward(ImageReward.Settings(kind="it", **files, **settings), context)


def test_equals_what_the_package_found(files, context, batch):
    found = make(context, files, template="{}")(batch)
    torch.testing.assert_close(found, torch.tensor(RECORDED), rtol=1e-5, atol=0)
    both = make(context, files, template="{}")(
        replace(batch, image_of=torch.tensor([1, 0]), captions=["w50", "w7 w8 w9"])
    )
    assert torch.equal(found, both)  # each image is compared with its own words


def test_in_bf16(files, context, batch):
    exact, low = (make(it, files, template="{}") for it in (context, replace(context, dtype=torch.bfloat16)))
    assert low(batch).dtype == torch.float32
    torch.testing.assert_close(low(batch), exact(batch), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({1: torch.zeros(1)}, "a tensor by the name 1, which is no text"),
        ({"blip.text_encoder.encoder.layer.0.intermediate.dense.weight": torch.zeros(())}, "sizes do not fit together"),
        ({"blip.visual_encoder.pos_embed": torch.zeros(1, 0, 64)}, "sizes do not fit together"),
        ({"mlp.layers.7.bias": torch.full((1,), float("inf"))}, "layers.7.bias holds NaN or infinite numbers"),
    ],
)
def test_malformed_weights_are_told_in_a_line(changes, told, tmp_path):
    path = str(tmp_path / "w.pt")
    torch.save(released() | changes, path)
    with pytest.raises(UserError) as error:
        load_image_reward(path)
    (line,) = error.value.problems
    assert line.startswith(path)
    assert told in line


def test_what_is_wrong_is_said(files, context, tmp_path):
    with pytest.raises(UserError, match=r"has neither vocab\.txt nor"):
        make(context, files | {"tokenizer": str(tmp_path)})
    torch.save({"blip.text_proj.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"does not hold ImageReward-v1\.0"):
        make(context, files | {"checkpoint": str(tmp_path / "w.pt")})
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(300))])
    )
    with pytest.raises(UserError, match=r"has 305 words, .* knows 200"):
        make(context, files | {"tokenizer": str(tmp_path)})
