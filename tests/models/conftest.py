import json
from pathlib import Path

import pytest
import torch

from grpo.models import GPT, GPTConfig, VQConfig, VQModel, load_gpt, load_vq

LLAMAGEN = Path(__file__).parents[1] / "fixtures" / "llamagen"
SIZES = json.loads((LLAMAGEN / "config.json").read_text())


@pytest.fixture(scope="session")
def llamagen() -> Path:
    """Folder of the weights of LlamaGen's own modules, drawn at random, and of what they computed."""
    return LLAMAGEN


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    return torch.load(LLAMAGEN / "expected.pt", weights_only=True)


@pytest.fixture(scope="session")
def gpt_config() -> GPTConfig:
    return GPTConfig(**SIZES["gpt"])


@pytest.fixture(scope="session")
def vq_configs() -> dict[str, VQConfig]:
    sizes = SIZES["vq"]
    return {
        name: VQConfig(
            codebook_size=sizes["codebook_size"],
            codebook_embed_dim=sizes["embed_dim"],
            ch=sizes["ch"],
            ch_mult=tuple(sizes[multipliers]),
            z_channels=sizes["z_channels"],
        )
        for name, multipliers in (("vq16", "m16"), ("vq8", "m8"))
    }


@pytest.fixture
def gpt(gpt_config: GPTConfig) -> GPT:
    return load_gpt(LLAMAGEN / "gpt_c2i.pt", gpt_config)


@pytest.fixture(params=["vq16", "vq8"])
def named_vq(request: pytest.FixtureRequest, vq_configs: dict[str, VQConfig]) -> tuple[str, VQModel]:
    return request.param, load_vq(LLAMAGEN / f"{request.param}.pt", vq_configs[request.param])
