"""Rewards by CLIP networks against the libraries that define them, on small random weights of the real layout."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from grpo.config import UserError
from grpo.formats import read_weights
from grpo.models import ClassCondition, Condition
from grpo.rewards import DecodedBatch
from grpo.rewards.aesthetic import Aesthetic
from grpo.rewards.clip import CLIP
from grpo.rewards.clip_networks import clip_pixels, quantised
from grpo.rewards.hps_v2 import HPSv2
from grpo.rewards.pick_score import PickScore
from grpo.rewards.words import TextFeatures, WordsTable
from tests.rewards.published_layouts import images, save_open_clip

open_clip = pytest.importorskip("open_clip", reason="the extra [rewards] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [rewards] is not installed")

SIZE = 64
CAPTIONS = ["tench, Tinca tinca", "great white shark, white shark"]
TEXTS = [f"a photo of {caption}" for caption in CAPTIONS]
ARCHITECTURE = "small-quickgelu"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights by kind: a file of open_clip's, HPSv2.1's, a folder of transformers', the aesthetic predictor's."""
    folder = tmp_path_factory.mktemp("weights")
    clip, hps = save_open_clip(folder, ARCHITECTURE, side=SIZE)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = {"vocab_size": 49408, "eos_token_id": 49407}, {"image_size": SIZE, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text | sizes, vision_config=vision | sizes, projection_dim=24)
    model = transformers.CLIPModel(config)
    model.logit_scale.data.fill_(4.0)
    model.save_pretrained(folder / "pick")
    layers = dict(zip((0, 2, 4, 6, 7), [(24, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)], strict=True))
    chain = nn.ModuleDict({str(place): nn.Linear(*widths) for place, widths in layers.items()})
    torch.save({f"layers.{name}": value for name, value in chain.state_dict().items()}, folder / "aesthetic.pth")
    return {
        "clip": str(clip),
        "hps": str(hps),
        "pick": str(folder / "pick"),
        "aesthetic": str(folder / "aesthetic.pth"),
    }


def decoded(pixels):
    """Four completions of two captions; the second group comes first."""
    image_of = torch.tensor([1, 1, 0, 0])
    condition = ClassCondition(image_of + 1)
    return DecodedBatch(pixels / 127.5 - 1, torch.zeros(4, 16), condition, torch.zeros(2, 3, 8, 8), image_of, CAPTIONS)


def make(reward, context, **settings):
    return reward(reward.Settings(kind="it", **settings), context)


@pytest.fixture(scope="module")
def expected_cosines(files):
    """By open_clip alone: its network, its pre-processing of Pillow images, its tokenizer."""
    network = open_clip.create_model(ARCHITECTURE, load_weights=False).eval()
    network.load_state_dict(read_weights(files["clip"]))
    preprocess, tokenizer = open_clip.image_transform(SIZE, is_train=False), open_clip.get_tokenizer(ARCHITECTURE)

    @torch.no_grad()
    def of(pixels, texts=TEXTS):
        seen = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
        features = network.encode_image(seen, normalize=True)
        return (features * network.encode_text(tokenizer(texts), normalize=True)[[1, 1, 0, 0]]).sum(-1)

    return of


def test_clip_and_hps_equal_open_clip(files, context, expected_cosines):
    pixels = images(4, SIZE)
    cosines = expected_cosines(pixels)
    found = make(CLIP, context, checkpoint=files["clip"], model=ARCHITECTURE)(decoded(pixels))
    torch.testing.assert_close(found, 5 * cosines, rtol=0, atol=1e-5)
    found = make(HPSv2, context, checkpoint=files["hps"], model=ARCHITECTURE)(decoded(pixels))
    torch.testing.assert_close(found, cosines, rtol=0, atol=1e-5)
    alias = make(CLIP, context, checkpoint=files["clip"], model=ARCHITECTURE, first_alias=True, scale=1)(
        decoded(pixels)
    )
    torch.testing.assert_close(alias, expected_cosines(pixels, ["a photo of tench", "a photo of great white shark"]))


def test_resized_images_differ_from_pillows_by_one_level_at_most(files, context, expected_cosines):
    """Pillow resizes in fixed point."""
    pixels = images(4, 100)
    ours = clip_pixels(pixels / 127.5 - 1, SIZE)
    preprocess = open_clip.image_transform(SIZE, is_train=False)
    theirs = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    levels = (ours - theirs) * 255 * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert levels.abs().max() < 1.01
    assert levels.abs().mean() < 0.01
    print(levels.abs().mean())
    found = make(CLIP, context, checkpoint=files["clip"], model=ARCHITECTURE, scale=1)(decoded(pixels))
    torch.testing.assert_close(found, expected_cosines(pixels), rtol=0, atol=2e-4)


def test_squashed_as_interpolate_does(files, context):
    pixels = images(4, 100)[:, :, :90]
    shrunk = nn.functional.interpolate(pixels.float() / 255, (SIZE, SIZE), mode="bilinear", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    ours = clip_pixels(pixels / 127.5 - 1, SIZE, "squash")
    torch.testing.assert_close(ours, (shrunk - mean) / std, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def published_processor(tmp_path_factory):
    """transformers' own tokenizer, with the vocabulary that open_clip ships, and its image processor."""
    folder = tmp_path_factory.mktemp("tokenizer")
    known = open_clip.SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({special.get(word, word): i for word, i in known.encoder.items()}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in known.bpe_ranks)]))
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return transformers.CLIPTokenizer.from_pretrained(folder), transformers.CLIPImageProcessor(**size)


@pytest.mark.parametrize("side", [SIZE, 100])
def test_pick_score_and_aesthetic_equal_transformers(files, context, published_processor, side):
    tokenizer, processor = published_processor
    pixels = images(4, side)
    model = transformers.CLIPModel.from_pretrained(files["pick"]).eval()
    with torch.no_grad():
        seen = processor(list(pixels), return_tensors="pt")["pixel_values"]
        words = tokenizer(TEXTS, padding=True, return_tensors="pt")
        output = model(pixel_values=seen, **words)
        logits = output.logits_per_image[torch.arange(4), [1, 1, 0, 0]]
        chain = torch.load(files["aesthetic"])
        x = output.image_embeds
        for place in (0, 2, 4, 6, 7):
            x = nn.functional.linear(x, chain[f"layers.{place}.weight"], chain[f"layers.{place}.bias"])
    atol = 1e-5 if side == SIZE else 1e-3  # the processor resizes in 8 bits, by up to one level otherwise
    found = make(PickScore, context, checkpoint=files["pick"])(decoded(pixels))
    torch.testing.assert_close(found, logits / 26, rtol=0, atol=atol)
    found = make(Aesthetic, context, checkpoint=files["aesthetic"], clip_checkpoint=files["pick"])(decoded(pixels))
    torch.testing.assert_close(found, x.squeeze(1), rtol=0, atol=atol)


def test_levels_are_the_published_ones(files, context, expected_cosines):
    edges = torch.tensor([-0.5, -1e-6, 0.0, 0.29, 0.3, 0.59, 0.6, 1.0, float("nan")])
    assert quantised(edges).tolist()[:-1] == [-1, -1, 0.5, 0.5, 1, 1, 1.5, 1.5]
    assert quantised(edges)[-1].isnan()
    found = make(CLIP, context, checkpoint=files["clip"], model=ARCHITECTURE, quantised=True)(decoded(images(4, SIZE)))
    assert torch.equal(found, quantised(expected_cosines(images(4, SIZE))))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="scale has no effect"):
        CLIP.Settings(kind="clip", checkpoint="x", quantised=True, scale=2)
    with pytest.raises(ValueError, match="must have"):
        CLIP.Settings(kind="clip", checkpoint="x", template="a photo")


def test_prompts_are_taken_as_they_are():
    batch = replace(decoded(images(4, SIZE)), condition=Condition(dropped=torch.zeros(4, dtype=torch.bool)))
    assert WordsTable(kind="it", first_alias=True).texts(batch) == CAPTIONS


def test_a_text_is_encoded_once():
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return torch.tensor([[len(text)] for text in texts])

    features = TextFeatures(encode)
    assert features(["a", "bb", "a"]).tolist() == [[1], [2], [1]]
    assert features(["bb", "ccc"]).tolist() == [[2], [3]]
    assert asked == [["a", "bb"], ["ccc"]]


def test_rewards_of_one_network_see_an_image_once(files, context):
    alone = replace(context, shared={})
    settings = {"checkpoint": files["clip"], "model": ARCHITECTURE}
    plain, levels = make(CLIP, alone, **settings), make(CLIP, alone, **settings, quantised=True)
    assert plain.networks == levels.networks
    seen = []
    plain.networks[0].register_forward_hook(lambda *_: seen.append(1))
    for side in (SIZE, 100):
        batch = decoded(images(4, side))
        assert torch.equal(levels(batch), quantised(plain(batch) / 5))
    assert len(seen) == 2
    other = make(CLIP, alone, **settings, resize="squash")(batch)
    assert len(seen) == 2
    assert not torch.equal(other, plain(batch))


def test_in_bf16(files, context):
    low = replace(context, dtype=torch.bfloat16, shared={})
    for reward, settings in (
        (CLIP, {"checkpoint": files["clip"], "model": ARCHITECTURE, "scale": 1}),
        (PickScore, {"checkpoint": files["pick"]}),
    ):
        exact, found = (make(reward, it, **settings)(decoded(images(4, 100))) for it in (context, low))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)


def test_what_is_wrong_is_said(files, context, monkeypatch, tmp_path):
    context = replace(context, shared={})

    def told(reward, **settings):
        with pytest.raises(UserError) as error:
            make(reward, context, **settings)
        return str(error.value)

    assert "no such file" in told(CLIP, checkpoint=str(tmp_path / "none.pt"), model=ARCHITECTURE)
    assert "is no CLIP that open_clip has" in told(CLIP, checkpoint=files["clip"], model="hf-hub:someone/else")
    assert "is no CLIP that open_clip has" in told(CLIP, checkpoint=files["clip"], model="xlm-roberta-base-ViT-B-32")
    assert f"does not hold a CLIP {ARCHITECTURE}" in told(CLIP, checkpoint=files["aesthetic"], model=ARCHITECTURE)
    assert "has no config.json" in told(PickScore, checkpoint=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "config.json is not that of a CLIP: it is of a bert" in told(PickScore, checkpoint=str(tmp_path))
    for sizes in {"hidden_size": 7}, {"image_size": "x"}, {"patch_size": 0}:
        small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1} | sizes
        text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
        config = {"model_type": "clip", "vision_config": small, "text_config": text}
        if "hidden_size" in sizes:
            small["num_attention_heads"] = 2
        (tmp_path / "config.json").write_text(json.dumps(config))
        problem = told(PickScore, checkpoint=str(tmp_path))
        assert f"{tmp_path}/config.json does not hold a CLIP: its sizes do not fit together (" in problem
    settings = {"clip_checkpoint": files["pick"], "checkpoint": files["clip"]}
    assert "does not hold the aesthetic predictor" in told(Aesthetic, **settings)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    assert "pip install 'autoregressive-grpo[rewards]'" in told(CLIP, checkpoint=files["clip"], model=ARCHITECTURE)
