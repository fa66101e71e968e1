"""Which settings make a GRPO step fast: the update, the tokenizer and their operations, one variant after another.

python benchmarks/bench_variants.py --json out.json                          # CPU, tiny: a minute or two
python benchmarks/bench_variants.py --json out.json --preset vapi-xxl-384    # one GPU: four minutes

The presets are those of bench_run.py, on fewer images. Every part of a step is timed by itself: the rollout's forward,
the update's passes, the optimizer, and the time for which the host is busy before the GPU has finished; where that is
about the whole, the GPU waits for the host. Then decoding with rewards, and encoding. Weights are random, and drawn on
the device. Variants are tried in the order of what they are worth knowing; each is written down when it is there, one
that raises (no memory) loses nothing of the others, and none is begun after `--deadline` seconds.
"""

import argparse
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_run import PRESETS, Preset, sizes_of
from comparison import DEVICE, header, now, spread_logits, write

from grpo.config import GRPORecipe, load_recipe
from grpo.data import ImageBatch
from grpo.estimate import device_peaks, grpo_work
from grpo.models import ClassCondition, build_tokenizer, get_family
from grpo.models.lpips import VGGStages
from grpo.observe import PhaseTimer
from grpo.parallel import World, build_mesh, distributed, parallelize, set_matmul_precision
from grpo.rewards import RewardSum, build_rewards
from grpo.rollout import build_draw, build_rollout
from grpo.training import PolicyUpdate, build_optimizer

ON_GPU = DEVICE.type == "cuda"
IMAGES = 64 if ON_GPU else 4  # of a measured step

COMPILED, EAGER = "--compile.enabled true ", "--compile.enabled false "
NONE, SELECTIVE, FULL = (f"--activation_checkpoint.mode {mode} " for mode in ("none", "selective", "full"))
ROWS = "--training.micro_batch_size "
BY_BLOCKS = "--parallel.reshard_after_forward always "
UPDATES = {
    "compiled, none, 16": COMPILED + NONE + ROWS + "16",
    "compiled, none, 32": COMPILED + NONE + ROWS + "32",
    "compiled, selective, 32": COMPILED + SELECTIVE + ROWS + "32",
    "compiled, none, 8": COMPILED + NONE + ROWS + "8",
}
MORE_UPDATES = {
    "compiled, none, 16, no dropout": COMPILED + NONE + ROWS + "16 --training.dropout_mode eval",
    "eager, none, 16": EAGER + NONE + ROWS + "16",
    "compiled, full, 64": COMPILED + FULL + ROWS + "64",
    "compiled, none, 8, gathered anew for each micro-batch": COMPILED + NONE + ROWS + "8 " + BY_BLOCKS,
    "eager, full, 8": EAGER + FULL + ROWS + "8",
    "compiled, selective, 64": COMPILED + SELECTIVE + ROWS + "64",
}
PROFILED = ("compiled, none, 16", "compiled, none, 8")
DECODERS = {  # compiled, torch.backends.cudnn.benchmark, completions at once
    "compiled, 64": (True, False, 64),
    "compiled, 64, cudnn.benchmark": (True, True, 64),
    "eager, 64": (False, False, 64),
    "eager, 64, cudnn.benchmark": (False, True, 64),
}
SMALL_DECODERS = {"compiled, 2": (True, False, 2), "compiled, 8": (True, False, 8)}  # as much as a cache may hold
ENCODERS = {  # compiled, channels last, cudnn.benchmark
    "eager": (False, False, False),
    "eager, cudnn.benchmark": (False, False, True),
    "eager, channels last": (False, True, False),
    "compiled": (True, False, False),
    "compiled, channels last, cudnn.benchmark": (True, True, True),
}
ENCODED = 16 if ON_GPU else 2  # images at once


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--only", default="", help="variants whose name has this text")
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after one warm-up")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds after which no variant is begun")
    options = parser.parse_args()
    preset, begin = PRESETS[options.preset], time.monotonic()
    result: dict[str, Any] = {**header(), "preset": options.preset, "images": IMAGES, "variants": {}, "failed": {}}
    set_matmul_precision("bf16" if ON_GPU else "auto")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, distributed(600) as world:
        context = (preset, Path(folder), world, options.steps)
        for part in options.parts:
            result["variants"][part] = {}
            for name, run in PARTS[part](*context):
                if options.only not in name or time.monotonic() - begin > options.deadline:
                    continue
                started = time.monotonic()
                try:
                    result["variants"][part][name] = numbers = run()
                    print(f"{part}, {name}: {shown(numbers)}; {time.monotonic() - started:.0f} s in all", flush=True)
                except Exception as error:
                    traceback.print_exc(limit=3)
                    result["failed"][f"{part}, {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                write(result, options.json)
                clean_up()


def shown(numbers: dict) -> str:
    """Numbers for the console."""
    scalars = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def clean_up() -> None:
    """So that a variant sees no memory of the one before."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def recipe_with(preset: Preset, flags: str, folder: Path) -> GRPORecipe:
    """The preset's recipe on `IMAGES` images, without weights but VGG's, which must be a file."""
    if not (vgg16 := folder / "vgg16.pth").exists():
        torch.save(VGGStages().state_dict(), vgg16)
    fixed = "--data.name synthetic --data.path none --tokenizer.checkpoint none --model.checkpoint none"
    pairs = [*preset.flags.split(), *fixed.split(), *flags.split(), "--rollout.batch_size", str(IMAGES)]
    latest = dict(zip(pairs[::2], pairs[1::2], strict=True))

    def load() -> GRPORecipe:
        return load_recipe(GRPORecipe, ["--config", preset.recipe, *(text for pair in latest.items() for text in pair)])

    latest["--training.batch_size"] = str(IMAGES * 8)
    if "lpips" in load().reward.active:
        latest["--reward.lpips.backbone"] = str(vgg16)
    return load()


def updates(
    preset: Preset, folder: Path, world: World, steps: int, *, variants: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Steps of rollout and update."""
    for name, flags in variants.items():
        yield name, partial(update_numbers, preset, flags, folder, world, steps, profiled=name in PROFILED)


def update_numbers(preset: Preset, flags: str, folder: Path, world: World, steps: int, *, profiled: bool) -> dict:
    """Seconds of the parts of a step on `IMAGES` images, the best of `steps`, and what they are of the peaks."""
    torch._dynamo.reset()  # or another number of rows would be compiled for any number
    recipe = recipe_with(preset, flags, folder)
    sizes, schedule, device = sizes_of(recipe), recipe.schedule(ranks=1), world.device
    with DEVICE:
        policy = get_family(recipe.model.name).build(sizes).to(DEVICE)
    spread_logits(policy)
    parallelize(
        policy.eval(),
        mesh=build_mesh(recipe.parallel, world),
        parallel=recipe.parallel,
        compile=recipe.compile,
        activation_checkpoint=recipe.activation_checkpoint,
        training=recipe.training,
    )
    optimizer = build_optimizer(policy, recipe, world)
    drawing = {"draw": build_draw(recipe.rollout, seed=0, impl=recipe.training.kernels), "schedule": schedule}
    codes = torch.randint(0, recipe.tokenizer.codebook_size, (IMAGES, sizes.block_size), device=device)
    rollout = build_rollout(policy, lambda batch: codes[batch.sample_ids % IMAGES], recipe.rollout, **drawing)
    update = PolicyUpdate(policy, optimizer, objective=recipe.objective, rollout=recipe.rollout, **drawing)
    timer, host, take = PhaseTimer(device), {}, optimizer.step
    batch = ImageBatch(
        torch.empty(IMAGES, 3, 0, 0, device=device),
        ClassCondition(torch.arange(IMAGES, device=device) % recipe.model.num_classes),
        torch.arange(IMAGES, device=device),
    )

    def optimizer_step() -> dict:
        host["update"] = time.perf_counter() - host.pop("begin")
        with timer("optimizer"):
            return take()

    optimizer.step = optimizer_step

    def step() -> dict:
        host["begin"] = now()
        timer.read()
        for part in batch.parts(schedule.images_per_part):
            with timer("rollout"):
                trajectory = rollout(part)
                trajectory.advantages = torch.randn(trajectory.tokens.shape[:2], device=device)
            with timer("update"):
                update(trajectory)
        return {**timer.read(), "host": host["update"]}

    compiling = now()
    step()
    compiling = now() - compiling
    measured = [step() for _ in range(steps)]
    best = {name: min(numbers[name] for numbers in measured) for name in measured[0]}
    numbers = {name.removeprefix("seconds/"): value for name, value in best.items()}
    flops, peak = grpo_work(recipe, sizes, schedule).flops, device_peaks(device).flops
    numbers |= {f"mfu/{phase}": flops[phase] / (numbers[phase] * peak) for phase in ("rollout", "update")}
    numbers["first"] = compiling
    if ON_GPU:
        numbers["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if profiled:
            numbers["kernels"] = kernels_of(step)
    return numbers


def kernels_of(run: Callable[[], object], most: int = 40) -> list[dict]:
    """The kernels of a run that take longest, as [name, launches, milliseconds]."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    rows = [
        (event.key[:110], event.count, event.device_time_total / 1000)
        for event in profile.key_averages()
        if event.device_time_total
    ]
    return sorted(rows, key=lambda row: -row[2])[:most]


def decoders(
    preset: Preset, folder: Path, world: World, steps: int, *, variants: Mapping[str, tuple[bool, bool, int]]
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Decoding and rewards of completions."""
    made: dict[tuple[bool, int], tuple[GRPORecipe, RewardSum]] = {}

    def run(compiled: bool, benchmark: bool, size: int) -> dict:
        if (compiled, size) not in made:  # cudnn.benchmark needs no other code
            made.clear()
            torch._dynamo.reset()
            recipe = recipe_with(preset, f"--compile.enabled {str(compiled).lower()}", folder)
            tokenizer = build_tokenizer(recipe.tokenizer, device=world.device)
            names = [str(number) for number in range(recipe.model.num_classes)]
            made[compiled, size] = (
                recipe,
                build_rewards(recipe.reward, tokenizer, class_names=names, device=world.device, compile=recipe.compile),
            )
        recipe, reward = made[compiled, size]
        reward.batch_size = size
        images, side, G = max(1, 2 * size // 8), recipe.data.image_size, 8
        length = sizes_of(recipe).block_size
        tokens = torch.randint(0, recipe.tokenizer.codebook_size, (images, G, length), device=world.device)
        condition = ClassCondition(torch.zeros(images, dtype=torch.int64, device=world.device))
        real = torch.rand(images, 3, side, side, device=world.device) * 2 - 1
        timer = PhaseTimer(world.device)

        def step() -> dict:
            now()
            timer.read()
            reward(tokens, condition, real, [""] * images, timer=timer)
            return timer.read()

        seconds = with_benchmark(benchmark, step, steps)
        return {name: value / (images * G) * 1024 for name, value in seconds.items()}  # of 1,024 completions

    for name, setting in variants.items():
        yield name, partial(run, *setting)


def encoders(preset: Preset, folder: Path, world: World, steps: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Codes of real images."""

    def run(compiled: bool, channels_last: bool, benchmark: bool) -> dict:
        recipe = recipe_with(preset, "", folder)
        tokenizer = build_tokenizer(recipe.tokenizer, device=world.device)
        if channels_last:
            tokenizer.to(memory_format=torch.channels_last)
        torch._dynamo.reset()
        if compiled:
            tokenizer.encoder.compile()
        images = torch.rand(ENCODED, 3, *[recipe.data.image_size] * 2, device=world.device) * 2 - 1

        def step() -> dict:
            begin = now()
            tokenizer.encode(images)
            return {"seconds": now() - begin}

        with torch.no_grad():
            seconds = with_benchmark(benchmark, step, steps)
        return {"seconds": seconds["seconds"] / ENCODED * 128}  # of 128 images

    for name, setting in ENCODERS.items():
        yield name, partial(run, *setting)


def with_benchmark(benchmark: bool, step: Callable[[], dict], steps: int) -> dict:
    """The best of some steps after a warm-up, with or without cuDNN's search for the fastest algorithms."""
    torch.backends.cudnn.benchmark = benchmark
    try:
        step()
        measured = [step() for _ in range(steps)]
    finally:
        torch.backends.cudnn.benchmark = False
    return {name.removeprefix("seconds/"): min(numbers[name] for numbers in measured) for name in measured[0]}


def operations(preset: Preset, folder: Path, world: World, steps: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The large operations of a block by themselves, at the rows of several micro-batches: TFLOP/s."""
    recipe = recipe_with(preset, "", folder)
    sizes = sizes_of(recipe)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    for images in (8, 16, 32) if ON_GPU else (1,):
        rows = images * sizes.block_size
        yield f"products of {rows} rows", partial(product_rates, sizes, rows, dtype)
    images = 16 if ON_GPU else 1
    backends = torch.nn.attention.SDPBackend
    for backend in (backends.FLASH_ATTENTION, backends.CUDNN_ATTENTION) if ON_GPU else (backends.MATH,):
        yield f"attention, {backend.name}", partial(attention_rates, sizes, images, dtype, backend)


def product_rates(sizes: Any, rows: int, dtype: torch.dtype) -> dict:
    """Forward, gradient of the rows and gradient of the weights of each product of a block."""
    D, F = sizes.dim, sizes.ffn_dim
    shapes = {"wqkv": (D, sizes.qkv_dim), "wo": (D, D), "w1": (D, F), "w1 and w3": (D, 2 * F), "w2": (F, D)}
    rates = {}
    for name, (inputs, outputs) in shapes.items():
        x, w, g = (
            torch.randn(size, dtype=dtype, device=DEVICE)
            for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        operands = {"forward": (x, w.t()), "rows": (g, w), "weights": (g.t(), x)}
        for kind, pair in operands.items():
            rates[f"{name}, {kind}"] = 2e-12 * rows * inputs * outputs / seconds_of(partial(torch.mm, *pair))
    return rates


def attention_rates(sizes: Any, images: int, dtype: torch.dtype, backend: Any) -> dict:
    """Causal attention as a block calls it, forward, and forward with backward; exact FLOP of the masked half."""
    shape = (images, sizes.block_size, sizes.n_head, sizes.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=DEVICE).transpose(1, 2).requires_grad_() for _ in range(3))
    flop = 2 * images * sizes.block_size**2 * sizes.dim

    def forward() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    gradient = torch.randn_like(forward())
    both = seconds_of(lambda: torch.autograd.grad(forward(), (q, k, v), gradient))
    return {"forward": 1e-12 * flop / seconds_of(forward), "forward and backward": 3.5e-12 * flop / both}


def seconds_of(run: Callable[[], object], repeats: int = 10 if ON_GPU else 1) -> float:
    """Of one of several runs in a row, after two."""
    for _ in range(2):
        run()
    begin = now()
    for _ in range(repeats):
        run()
    return (now() - begin) / repeats


PARTS = {  # the first ones answer most
    "updates": partial(updates, variants=UPDATES),
    "decoders": partial(decoders, variants=DECODERS),
    "operations": operations,
    "encoders": encoders,
    "small decoders": partial(decoders, variants=SMALL_DECODERS),
    "more updates": partial(updates, variants=MORE_UPDATES),
}

if __name__ == "__main__":
    main()
