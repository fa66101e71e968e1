"""MANIQA against pyiqa's, on small weights of the released layout."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from grpo.config import UserError
from grpo.models import ClassCondition
from grpo.rewards import DecodedBatch
from grpo.rewards.maniqa import MANIQAScore
from tests.rewards.published_layouts import counted, images

timm = pytest.importorskip("timm", reason="the extra [rewards] is not installed")

SIDE, WIDTH, HIDDEN, WINDOW, HEADS = 64, 64, 32, 4, 2  # of images; of tokens, perceptrons, windows
RECORDED = [0.9581527709960938, 0.9338260889053345]  # by pyiqa 0.1.16 for two images, in fp32


def released():
    """Weights with the names of a released file."""
    vit = timm.models.VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=WIDTH, depth=12, num_heads=1)
    shapes = {f"vit.{name}": tuple(value.shape) for name, value in vit.state_dict().items()}
    places = (SIDE // 8) ** 2
    for stage, width in (1, WIDTH), (2, WIDTH // 2):
        layers = {f"conv{stage}": (width, 4 * WIDTH if stage == 1 else WIDTH, 1, 1)}
        layers |= {f"tablock{stage}.{i}.c_{part}": (places, places) for i in (0, 1) for part in "qkv"}
        swin = f"swintransformer{stage}"
        layers[f"{swin}.downsample"] = (width, width, 3, 3)
        for layer in (0, 1):
            layers[f"{swin}.layers.{layer}.conv"] = (width, width, 3, 3)
            for i in (0, 1):
                block = f"{swin}.layers.{layer}.blocks.{i}"
                layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
                layers |= {f"{block}.mlp.fc1": (HIDDEN, width), f"{block}.mlp.fc2": (width, HIDDEN)}
                layers |= {f"{block}.norm1": (width,), f"{block}.norm2": (width,)}
                shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, HEADS)
        shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    half = WIDTH // 2
    for head in "fc_score", "fc_weight":
        shapes |= {f"{head}.0.weight": (half, half), f"{head}.0.bias": (half,)}
        shapes |= {f"{head}.3.weight": (1, half), f"{head}.3.bias": (1,)}
    weights = counted(shapes)
    weights["fc_score.3.bias"].fill_(1)  # so that no score is 0
    return weights | fixed_tables([name for name in weights if name.endswith("bias_table")])


def fixed_tables(tables):
    """What the file has besides: of each window's pairs their relative place, and who may not see whom."""
    places = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
    apart = places[:, None] - places[None] + WINDOW - 1  # [w * w, w * w, 2]
    index = apart[..., 0] * (2 * WINDOW - 1) + apart[..., 1]
    side, shift = SIDE // 8, WINDOW // 2
    cut = torch.zeros(side, dtype=torch.long)  # three regions a side after the move
    cut[-WINDOW:-shift], cut[-shift:] = 1, 2
    region = (3 * cut[:, None] + cut[None]).unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW).reshape(-1, WINDOW**2)
    mask = torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
    found = {table.replace("bias_table", "index"): index for table in tables}
    blocks = {table.partition("attn.")[0] for table in tables if ".blocks.1." in table}
    return found | {f"{block}attn_mask": mask for block in blocks}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("maniqa") / "released.pth"
    torch.save({"params": released()}, path)
    return str(path)


def decoded(pixels, ids=None):
    count = len(pixels)
    ids = torch.arange(count) if ids is None else ids
    rest = torch.zeros(count, 16), ClassCondition(torch.zeros(count, dtype=torch.long)), None, torch.arange(count)
    return DecodedBatch(pixels / 127.5 - 1, *rest, completion_ids=ids)


@pytest.fixture
def score(checkpoint, context):
    def of(pixels, ids=None, **settings):
        reward = MANIQAScore(MANIQAScore.Settings(kind="maniqa", checkpoint=checkpoint, **settings), context)
        with torch.no_grad():
            return reward(decoded(pixels, ids))

    return of


def test_equals_what_pyiqa_found(score):
    """An image of a crop's size is its own only crop."""
    torch.testing.assert_close(score(images(2, SIDE)), torch.tensor(RECORDED), rtol=1e-5, atol=0)


def test_equals_pyiqa(checkpoint, score):
    arch = pytest.importorskip("pyiqa.archs.maniqa_arch", reason="pyiqa is not installed, only its numbers are here")
    vit = timm.models.VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=WIDTH, depth=12, num_heads=1)
    sizes = {"img_size": SIDE, "embed_dim": WIDTH, "dim_mlp": HIDDEN, "num_heads": [HEADS, HEADS], "scale": 0.13}
    with mock.patch.object(arch.timm, "create_model", return_value=vit):
        theirs = arch.MANIQA(**sizes, pretrained=False, test_sample=1).eval()
    theirs.load_state_dict(torch.load(checkpoint)["params"])
    pixels = images(3, SIDE)
    with mock.patch.object(arch, "uniform_crop", lambda x, **_: x), torch.no_grad():
        expected = theirs(pixels.float() / 255).squeeze(1)
    torch.testing.assert_close(score(pixels, scale=0.13), expected, rtol=1e-5, atol=0)


def test_crops_are_the_mean_and_depend_on_the_completion_alone(score, checkpoint, context):
    pixels, ids = images(2, 80), torch.tensor([7, 1 << 40])
    both = score(pixels, ids, crops=3)
    assert torch.equal(score(pixels.flip(0), ids.flip(0), crops=3).flip(0), both)
    assert not torch.equal(score(pixels, ids + 1, crops=3), both)
    reward = MANIQAScore(MANIQAScore.Settings(kind="maniqa", checkpoint=checkpoint, crops=3), context)
    corners = reward._corners(ids, (80, 80))
    parts = torch.stack([pixels[0, :, y : y + SIDE, x : x + SIDE] for y, x in corners[0].tolist()])
    torch.testing.assert_close(score(parts).mean(), both[0], rtol=1e-5, atol=0)


def test_corners_reach_all_places_that_the_published_code_reaches(checkpoint, context):
    reward = MANIQAScore(MANIQAScore.Settings(kind="maniqa", checkpoint=checkpoint, crops=200), context)
    corners = reward._corners(torch.arange(5), (SIDE + 4, SIDE + 1)).flatten(0, 1)
    assert corners[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert corners[:, 1].unique().tolist() == [0]


def test_smaller_images_are_enlarged(score):
    small = images(1, 32)
    large = torch.nn.functional.interpolate(small.float(), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(score(small), score(large.round().to(torch.uint8)), rtol=1e-3, atol=0)


def test_in_bf16(checkpoint, context, score):
    settings = MANIQAScore.Settings(kind="maniqa", checkpoint=checkpoint)
    low = MANIQAScore(settings, replace(context, dtype=torch.bfloat16))(decoded(images(2, SIDE)))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, score(images(2, SIDE)), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (None, "does not hold MANIQA: 'vit.patch_embed.proj.weight' is missing"),
        ({1: torch.zeros(1)}, "a tensor by the name 1, which is no text"),
        ({"vit.patch_embed.proj.weight": torch.zeros(200, 3, 8, 8)}, "sizes do not fit together (dim should be divis"),
        ({"swintransformer1.layers.0.conv.weight": torch.zeros(())}, "sizes do not fit together (len() of a 0-d"),
        ({"vit.pos_embed": torch.zeros(1, 0, WIDTH)}, "sizes do not fit together"),
        ({"conv1.bias": torch.full((WIDTH,), float("nan"))}, "conv1.bias holds NaN or infinite numbers"),
    ],
)
def test_other_weights_are_refused(tmp_path, context, changes, told):
    path = str(tmp_path / "w.pt")
    torch.save({"conv1.weight": torch.zeros(1)} if changes is None else released() | changes, path)
    with pytest.raises(UserError) as error:
        MANIQAScore(MANIQAScore.Settings(kind="maniqa", checkpoint=path), context)
    (line,) = error.value.problems
    assert line.startswith(path)
    assert told in line
