"""The job `train` with small stand-ins under the names of the published sizes. Started by torchrun in place of the
reference trainer's script, with its command line as it is printed.

What differs from a real run, and nothing else: GPT-XXL has 2 layers of width 64 instead of 48 of 1536, VQ-16 and
VGG16 have a sixteenth of their channels or less (the five levels, the stages, the names of the weights and the codebook
of 16384 codes are the real ones), LPIPS' heads are random because the published ones are as wide as VGG16, and the run
ends after one of its 100 steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from grpo.config import load_recipe
from grpo.jobs import train_grpo
from grpo.models import GPT, VQModel, lpips, specs
from grpo.parallel import run_main

STEPS = 1
GPT_SPEC = specs.ModelSpec(dim=64, n_layer=2, n_head=2)
VQ_SPEC = specs.TokenizerSpec(ch=4, ch_mult=(1, 1, 2, 2, 4), z_channels=16, norm_groups=4)
VGG_STAGES = ((4, 4), (8, 8), (16, 16, 16), (32, 32, 32), (32, 32, 32))


def use_stand_ins() -> None:
    """Put the small sizes under the published names."""
    specs.GPT_SPECS["GPT-XXL"], specs.TOKENIZER_SPECS["VQ-16"] = GPT_SPEC, VQ_SPEC
    lpips._STAGES = VGG_STAGES
    lpips._published_heads = lambda: [torch.ones(stage[-1]) for stage in VGG_STAGES]


def save_stand_ins(folder: Path) -> None:
    """What the command names: files G, V and folder D; and VGG16 where torch keeps its downloads in this TORCH_HOME."""
    torch.manual_seed(0)
    gpt = GPT(GPT_SPEC.config(image_size=384))
    torch.nn.init.normal_(gpt.output.weight, std=0.1)
    torch.save(gpt.state_dict(), folder / "G")  # bare, as --from-fsdp says
    torch.save({"model": VQModel(VQ_SPEC.config()).state_dict()}, folder / "V")
    pixels = torch.randint(256, (40, 400, 390, 3), dtype=torch.uint8)
    images = [Image.fromarray(image.numpy()) for image in pixels]
    rows = Dataset.from_dict({"image": images, "label": [25 * i for i in range(40)]})
    DatasetDict({"train": rows}).save_to_disk(folder / "D")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    with patch.object(lpips, "_STAGES", VGG_STAGES):
        torch.save(lpips.VGGStages().state_dict(), folder / "hub" / "checkpoints" / lpips.BACKBONE)


def main(arguments: Sequence[str]) -> None:
    """The job, shortened."""

    def shortened(*how: Any, **more: Any) -> Any:
        recipe = load_recipe(*how, **more)
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": STEPS})})

    use_stand_ins()
    train_grpo.load_recipe = shortened
    train_grpo.main(arguments)


if __name__ == "__main__":
    run_main(main)
