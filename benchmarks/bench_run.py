"""A whole GRPO run, phase by phase: a few steps of recipes/grpo.py against the reference algorithm, extrapolated.

python benchmarks/bench_run.py                                   # CPU, tiny: a minute
python benchmarks/bench_run.py --preset vapi-xxl-384 --json out.json   # one H200

The published run of the reference trainer (VA-π, arXiv 2512.19680: GPT-XXL, 384 px, 102,400 completions) took 25
minutes on eight A100s. The preset runs its settings on one device with random weights and random images, which cost
what real ones cost: 128 images and 1,024 completions a step, 100 steps. The reference algorithm's step is measured on
a few images (`--reference-images`) with the same models and scaled up, since a whole one would take minutes.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn import functional as F

from benchmarks import reference_algorithm
from benchmarks.bench_update import now
from grpo.config import GRPORecipe, load_recipe
from grpo.models import GPT, VQModel
from grpo.observe import environment, read_metrics
from grpo.parallel import compute_dtype, distributed
from grpo.training import gpt_config
from grpo.training.build import build_tokenizer
from recipes.grpo import train

ROOT = Path(__file__).resolve().parents[1]
SYNTHETIC = ["--data.name", "synthetic", "--data.path", "none", "--model.checkpoint", "none", "--data.num_workers", "4"]
SYNTHETIC += ["--tokenizer.checkpoint", "none", "--checkpoint.save_final", "false", "--checkpoint.interval", "0"]
SYNTHETIC += ["--metrics.image_interval", "0", "--metrics.interval", "1"]


@dataclass(frozen=True)
class Preset:
    """A recipe file, what to change in it, and how long the real run is."""

    recipe: str
    flags: str
    run_steps: int


PRESETS = {
    "debug": Preset("train_configs/debug.toml", "--data.num_workers 0", 100),
    "vapi-xxl-384": Preset(
        "train_configs/vapi_xxl_384.toml",
        "--rollout.batch_size 128 --training.batch_size 16 --training.gradient_accumulation_steps 64 "
        "--activation_checkpoint.mode none --compile.enabled true --data.cache_codes false --reward.batch_size 128",
        100,
    ),
}


def main() -> None:
    """Measure, extrapolate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=PRESETS, default="debug")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one warm-up")
    parser.add_argument("--reference-images", type=int, default=2, help="images of the reference algorithm's part")
    options, flags = parser.parse_known_args()
    preset = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", str(ROOT / preset.recipe), *SYNTHETIC, *preset.flags.split()]
        arguments += ["--training.steps", str(options.steps + 1), "--metrics.run_dir", folder, *flags]
        recipe = load_recipe(GRPORecipe, arguments)
        ours = our_steps(recipe)
    reference = reference_step(recipe, images=options.reference_images)
    minutes = {
        "ours": ours["seconds"]["step"] * preset.run_steps / 60,
        "reference": reference["step"] * preset.run_steps / 60,
    }
    result = {
        **environment(),
        "date": date.today().isoformat(),
        "preset": options.preset,
        "sizes": {"images": recipe.rollout.batch_size, "G": recipe.rollout.num_generations, "steps": preset.run_steps},
        "sides": {"ours": ours, "reference": reference},
        "run_minutes": minutes,
        "speedup": minutes["reference"] / minutes["ours"],
    }
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in ours["seconds"].items())
    print(f"ours, seconds a step: {phases}; peak memory {ours['peak_gb']:.1f} GB")
    print(f"reference, seconds a step: {', '.join(f'{phase} {seconds:.2f}' for phase, seconds in reference.items())}")
    print(
        f"whole run: {minutes['ours']:.1f} minutes, reference algorithm {minutes['reference']:.1f} on the same device"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def our_steps(recipe: GRPORecipe) -> dict:
    """Medians over the measured steps of the recipe as it is trained."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)
    lines = read_metrics(recipe.run_dir / "metrics.jsonl")[1:]
    phases = [name for name in lines[0] if name.startswith("seconds/")]
    seconds = {name.removeprefix("seconds/"): statistics.median(line[name] for line in lines) for name in phases}
    return {"seconds": seconds, "peak_gb": lines[-1]["memory/peak_gb"], "mfu": lines[-1].get("mfu")}


def reference_step(recipe: GRPORecipe, *, images: int) -> dict[str, float]:
    """Seconds that a step takes by the reference algorithm: a part of it is measured and scaled up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = GPT(gpt_config(recipe)).eval().to(device, compute_dtype(recipe.training.mixed_precision))
    torch.nn.init.normal_(model.output.weight, std=2.0 / model.config.dim**0.5)
    tokenizer = build_tokenizer(recipe.tokenizer, device=device)
    G, length = recipe.rollout.num_generations, model.config.block_size
    class_ids, real = (
        torch.arange(images, device=device),
        torch.rand(images, 3, *[recipe.data.image_size] * 2, device=device),
    )
    seconds = dict.fromkeys(("encode", "rollout", "reward", "update"), 0.0)
    for _ in range(2):  # the first round warms up
        marks = [now()]
        codes = tokenizer.encode(real)
        marks.append(now())
        trajectory = reference_algorithm.sample(model, class_ids, codes, num_generations=G)
        marks.append(now())
        decode_and_score(tokenizer, trajectory.tokens.view(-1, length), real.repeat_interleave(G, dim=0))
        marks.append(now())
        trajectory.advantages = torch.randn(images, G, device=device)
        reference_algorithm.update(model, trajectory, batch_size=8, clip=0.2, aux_ce_weight=0.1)
        model.zero_grad()
        marks.append(now())
        seconds = {name: end - start for name, start, end in zip(seconds, marks, marks[1:], strict=False)}
    scaled = {name: value * recipe.rollout.batch_size / images for name, value in seconds.items()}
    return {**scaled, "step": sum(scaled.values())}


@torch.no_grad()
def decode_and_score(tokenizer: VQModel, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """fp32 decoding in chunks of 8, as the reference trainer does, and minus the squared error."""
    images = torch.cat([tokenizer.decode(chunk) for chunk in tokens.split(8)])
    return -F.mse_loss(images, real, reduction="none").mean(dim=(1, 2, 3))


if __name__ == "__main__":
    main()
