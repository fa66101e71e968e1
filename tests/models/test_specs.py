"""Every named size builds, with the published number of parameters."""

import pytest
import torch

from grpo.config import UserError
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, VQModel, get_family, get_tokenizer_spec

PUBLISHED_MILLIONS = {
    "GPT-B": 111,
    "GPT-L": 343,
    "GPT-XL": 775,
    "GPT-XXL": 1411,
    "GPT-XXXL": 3893,
    "GPT-1B": 1200,
    "GPT-3B": 3097,
    "GPT-7B": 6615,
}


def millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("name", MODEL_SPECS)
def test_gpt_specs(name):
    with torch.device("meta"):
        model = GPT(MODEL_SPECS[name].config(image_size=384))
    assert model.config.block_size == 576
    if name in PUBLISHED_MILLIONS:
        assert round(millions(model)) == PUBLISHED_MILLIONS[name]


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_text_conditional_specs(name):
    """The class table gives way to the projection of captions."""
    spec = MODEL_SPECS[name]
    with torch.device("meta"):
        model = GPT(spec.config(image_size=256, cls_token_num=120, caption_dim=2048))
        classes = GPT(spec.config(image_size=256))
    assert model.cls_embedding.uncond_embedding.shape == (120, 2048)
    gained = spec.dim * (2048 + spec.dim) - 1001 * spec.dim
    assert millions(model) == pytest.approx(millions(classes) + gained / 1e6)


@pytest.mark.parametrize(("name", "count"), [("VQ-16", 71.9), ("VQ-8", 70.1)])
def test_tokenizer_specs(name, count):
    with torch.device("meta"):
        model = VQModel(get_tokenizer_spec(name).config())
    assert millions(model) == pytest.approx(count, abs=0.05)
    assert model.config.downsample_size == int(name.removeprefix("VQ-"))


def test_the_quickstarts_models_are_small():
    config = MODEL_SPECS["GPT-digits"].config(image_size=32, downsample_size=4, vocab_size=256, num_classes=10)
    assert (config.block_size, config.ffn_dim, config.rope_base) == (64, 384, 100)
    assert millions(GPT(config)) == pytest.approx(0.92, abs=0.005)
    assert millions(VQModel(TOKENIZER_SPECS["VQ-digits"].config(codebook_size=256))) < 0.25


@pytest.mark.parametrize("name", ["VQ-digits", "VQ-shapes", "VQ-tiny"])
@torch.no_grad()
def test_small_tokenizers_run(name):
    model = VQModel(TOKENIZER_SPECS[name].config(codebook_size=32)).eval()
    codes = model.encode(torch.zeros(1, 3, 16, 16))
    assert codes.shape == (1, 16)
    assert model.decode(codes).shape == (1, 3, 16, 16)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"model\.name: there is no 'gpt_xl'; did you mean GPT-XL\?"):
        get_family("gpt_xl")
    with pytest.raises(UserError, match=r"tokenizer\.name: there is no 'VQ-32'; did you mean VQ-"):
        get_tokenizer_spec("VQ-32")


@pytest.mark.parametrize(("image_size", "advice"), [(250, "take 240"), (8, "take 16")])
def test_images_must_be_whole_codes_wide(image_size, advice):
    with pytest.raises(UserError, match=advice):
        MODEL_SPECS["GPT-B"].config(image_size=image_size)
