"""A whole GRPO run, phase by phase: a few steps of recipes/train_grpo.py against the reference algorithm, extrapolated.

python benchmarks/bench_run.py                                   # CPU, tiny: a minute
python benchmarks/bench_run.py --json out.json --sweep             # and three more
python benchmarks/bench_run.py --preset vapi-xxl-384 --json out.json   # one H200

The published run of the reference trainer (VA-π, arXiv 2512.19680: GPT-XXL, 384 px, 102,400 completions) took 25
minutes on eight A100s. The preset runs its settings on one device (dropout in the update, squared error and LPIPS) with
random weights and random images, which cost what real ones cost: 128 images and 1,024 completions a step, 100 steps.
The reference algorithm's step is measured on a few images (`--reference-images`, 0 for none) with the same models and
scaled up, since a whole one would take minutes; it has no dropout and no LPIPS. Its memory is that of those few images;
both sides' is the peak above the loaded models, and holds an optimizer's state. Of a run that is cut off the steps'
metrics are in the folder RESULTS-run beside `--json RESULTS.json`.
"""

import argparse
import gc
import shutil
import statistics
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison import DEVICE, header, now, spread_logits, write
from torch.nn import functional as F

import reference_algorithm
from grpo.config import GRPORecipe, load_recipe
from grpo.jobs.train_grpo import train
from grpo.models import ClassCondition, VQModel, build_tokenizer, generator_sizes, get_family, tokenizer_sizes
from grpo.models.lpips import VGGStages
from grpo.observe import read_metrics
from grpo.parallel import compute_dtype, distributed
from harness import peak_bytes

SYNTHETIC = (
    "--data.name synthetic --data.path none --tokenizer.checkpoint none "
    "--checkpoint.save_final false --checkpoint.interval 0 --metrics.image_interval 0 --metrics.interval 1"
)


@dataclass(frozen=True)
class Preset:
    """A shipped recipe, what to change in it, and how long the real run is."""

    recipe: str
    flags: str
    run_steps: int


PRESETS = {
    "cpu": Preset(
        "debug",
        "--data.num_workers 0 --data.image_size 64 --tokenizer.codebook_size 4096 --rollout.batch_size 4 "
        "--rollout.num_generations 8 --training.batch_size 32 --training.micro_batch_size 1",
        100,
    ),
    "vapi-xxl-384": Preset(
        "published/vapi_xxl_384_one_gpu",
        "--data.num_workers 4 --data.cache_codes false --reward.batch_size 64",
        100,
    ),
}
# Of the cpu preset: 4 images of 64 pixels (256 codes), 8 completions, V = 4096, a model of 2 blocks.
SWEEPS: dict[str, dict[Any, str]] = {
    "G": {value: f"--rollout.num_generations {value} --training.batch_size {4 * value}" for value in (2, 4, 8)},
    "images": {value: f"--rollout.batch_size {value} --training.batch_size {8 * value}" for value in (2, 4, 8)},
    "pixels": {value: f"--data.image_size {value}" for value in (32, 64, 96)},
    "V": {value: f"--tokenizer.codebook_size {value}" for value in (256, 4096, 16384)},
    "model": {name: f"--model.name {name}" for name in ("GPT-tiny", "GPT-digits")},
}


def main() -> None:
    """Measure, extrapolate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one warm-up")
    parser.add_argument("--sweep", action="store_true", help="also how both grow with each size; plots beside --json")
    parser.add_argument("--reference-images", type=int, default=2, help="images of the reference algorithm's part")
    parser.add_argument("--profile", type=Path, help="folder for the profiler's table of one step; nothing is measured")
    options, flags = parser.parse_known_args()
    preset = PRESETS[options.preset]
    if options.profile:
        profile(preset, flags, options.profile)
        return
    result = {**header(), "preset": options.preset}
    for part in measure(preset, flags, options):  # each side is written down when it is there
        result |= part
        write(result, options.json)
    if options.sweep:
        result["sweeps"] = {
            name: [
                {name: value, **merged(measure(preset, [*flags, *change.split()], options))}
                for value, change in points.items()
            ]
            for name, points in SWEEPS.items()
        }
        write(result, options.json)


def merged(parts: Iterable[dict]) -> dict:
    """The last word of each key."""
    return {key: value for part in parts for key, value in part.items()}


def measure(preset: Preset, flags: Sequence[str], options: argparse.Namespace) -> Iterator[dict]:
    """A preset with changes: what is known after ours, and after the reference. A side that raises is told."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = options.json.with_name(f"{options.json.stem}-run") if options.json else Path(folder, "run")
        recipe = recipe_of(preset, flags, options.steps + 1, run_dir, Path(folder))
        if not torch.cuda.is_available():  # the memory of libraries that are used for the first time is not the step's
            run_recipe(recipe_of(preset, flags, 1, Path(folder, "warm-up"), Path(folder)))
        runs = {"ours": lambda: our_steps(recipe)}
        if options.reference_images:
            runs["reference"] = lambda: reference_step(recipe, images=options.reference_images)
        sides, failed = {}, {}
        for side, run in runs.items():
            try:
                sides[side] = run()
            except Exception as error:
                traceback.print_exc()
                failed[side] = f"{type(error).__name__}: {error}"
            yield summary(recipe, preset, sides, failed, options)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if side in sides:
                show(side, sides[side], sides[side]["seconds"] * preset.run_steps / 60)


def show(side: str, numbers: dict, minutes: float) -> None:
    """A side for the console."""
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in numbers["phases"].items())
    shares = ", ".join(f"{name} {value:.3f}" for name, value in numbers.get("shares", {}).items())
    print(f"{side}, seconds a step: {phases}; in all {numbers['seconds']:.2f}; {shares}", end="; ")
    above = f"{numbers['peak_bytes'] / 2**30:.2f} GiB above the models"
    print(f"{above}; whole run {minutes:.1f} minutes", flush=True)


def summary(recipe: GRPORecipe, preset: Preset, sides: dict, failed: dict, options: argparse.Namespace) -> dict:
    """What goes into the JSON of the sides that are there."""
    minutes = {side: numbers["seconds"] * preset.run_steps / 60 for side, numbers in sides.items()}
    result = {
        "sizes": {
            "images": recipe.rollout.batch_size,
            "G": recipe.rollout.num_generations,
            "T": sizes_of(recipe).block_size,
            "V": recipe.tokenizer.codebook_size,
            "steps": preset.run_steps,
            "reference_images": options.reference_images,
        },
        "sides": sides,
        "failed": failed,
        "run_minutes": minutes,
    }
    if len(sides) == 2:
        result["speedup"] = minutes["reference"] / minutes["ours"]
        result["memory_ratio"] = sides["ours"]["peak_bytes"] / sides["reference"]["peak_bytes"]
    return result


def recipe_of(preset: Preset, flags: Sequence[str], steps: int, run_dir: Path, folder: Path) -> GRPORecipe:
    """The preset's recipe with changes, and with random weights in `folder`."""
    pairs = [*SYNTHETIC.split(), *preset.flags.split(), *flags, "--model.checkpoint", "none"]
    pairs += ["--training.steps", str(steps), "--metrics.run_dir", str(run_dir)]
    latest = dict(zip(pairs[::2], pairs[1::2], strict=True))  # a flag may not be given twice

    def load() -> GRPORecipe:
        rest = [text for pair in latest.items() for text in pair]
        return load_recipe(GRPORecipe, ["--config", preset.recipe, *rest])

    latest |= random_weights(load(), folder)
    return load()


def random_weights(recipe: GRPORecipe, folder: Path) -> dict[str, str]:
    """Flags of weights that are written to `folder`, in the layouts of the published ones.

    The generator is drawn on the device: a CPU, where the job would draw it, takes half a minute for GPT-XXL.
    """
    generator, vgg16 = folder / "generator.pt", folder / "vgg16.pth"
    if not generator.exists():
        torch.manual_seed(0)
        with DEVICE:
            model = get_family(recipe.model.name).build(sizes_of(recipe))
        spread_logits(model)
        torch.save({"model": model.bfloat16().state_dict()}, generator)
        torch.save(VGGStages().state_dict(), vgg16)
    backbone = {"--reward.lpips.backbone": str(vgg16)} if "lpips" in recipe.reward.active else {}
    return {"--model.checkpoint": str(generator), **backbone}


def profile(preset: Preset, flags: Sequence[str], out: Path) -> None:
    """A warm-up and a step under the profiler: its table goes to `out`, its trace, some hundred megabytes, does not."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        recipe = recipe_of(preset, [*flags, "--debug.profile", "2"], 2, run_dir, Path(folder))
        run_recipe(recipe)
        (table,) = run_dir.glob("trace-*.txt")
        shutil.copy(table, out / f"step-{recipe.model.name}.txt")
        print(table.read_text())


def sizes_of(recipe: GRPORecipe) -> Any:
    """Sizes of the recipe's generator."""
    return generator_sizes(recipe.model, recipe.tokenizer, image_size=recipe.data.image_size)


def run_recipe(recipe: GRPORecipe) -> None:
    """The training job."""
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def our_steps(recipe: GRPORecipe) -> dict:
    """Medians over the measured steps of the recipe as it is trained. Phases that overlap count in full."""
    peak = peak_bytes(lambda: run_recipe(recipe))  # from before the models are there
    lines = read_metrics(recipe.run_dir / "metrics.jsonl")[1:]
    if torch.cuda.is_available():  # every step's peak is read, and starts anew
        peak = int(max(line["memory/peak_gb"] for line in lines) * 2**30)
    medians = {
        name: statistics.median(line[name] for line in lines) for name in lines[0] if "/" in name or name == "mfu"
    }
    phases = {name.removeprefix("seconds/"): value for name, value in medians.items() if name.startswith("seconds/")}
    with torch.device("meta"):
        models = (get_family(recipe.model.name).build(sizes_of(recipe)), VQModel(tokenizer_sizes(recipe.tokenizer)))
    return {
        "seconds": phases.pop("step"),
        "phases": phases,
        "shares": {name: value for name, value in medians.items() if name.startswith(("mfu", "bandwidth"))},
        "whole_peak_bytes": peak,
        "peak_bytes": peak - sum(parameter.numel() * 4 for model in models for parameter in model.parameters()),
    }


def reference_step(recipe: GRPORecipe, *, images: int) -> dict:
    """What a step takes by the reference algorithm: a part of it is measured, and its time scaled up."""
    torch.manual_seed(0)
    with DEVICE:
        model = get_family(recipe.model.name).build(sizes_of(recipe)).eval()
    model.to(DEVICE, compute_dtype(recipe.training.mixed_precision))
    spread_logits(model)
    tokenizer = build_tokenizer(recipe.tokenizer, device=DEVICE)
    G, length = recipe.rollout.num_generations, model.config.block_size
    condition = ClassCondition(torch.arange(images, device=DEVICE))
    real = torch.rand(images, 3, *[recipe.data.image_size] * 2, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    marks: list[float] = []

    def step() -> None:
        marks[:] = [now()]
        codes = tokenizer.encode(real)
        marks.append(now())
        trajectory = reference_algorithm.sample(model, condition, codes, num_generations=G)
        marks.append(now())
        decode_and_score(tokenizer, trajectory.tokens.view(-1, length), real.repeat_interleave(G, dim=0))
        marks.append(now())
        trajectory.advantages = torch.randn(images, G, device=DEVICE)
        reference_algorithm.update(model, trajectory, batch_size=8, clip=0.2, aux_ce_weight=0.1)
        optimizer.step()
        model.zero_grad()
        marks.append(now())

    peak = peak_bytes(step)  # of the first step, which also warms up and makes the optimizer's state
    step()
    names = ("encode", "rollout", "reward", "update")
    seconds = {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}
    scaled = {name: value * recipe.rollout.batch_size / images for name, value in seconds.items()}
    return {"seconds": sum(scaled.values()), "phases": scaled, "peak_bytes": peak}


@torch.no_grad()
def decode_and_score(tokenizer: VQModel, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """fp32 decoding in chunks of 8, as the reference trainer does, and minus the squared error."""
    images = torch.cat([tokenizer.decode(chunk) for chunk in tokens.split(8)])
    return -F.mse_loss(images, real, reduction="none").mean(dim=(1, 2, 3))


if __name__ == "__main__":
    main()
