"""What a run says of itself at its start and at its end: what it is, how large, where its results are, what next."""

from collections.abc import Iterator

import torch
from torch import nn

from grpo.config import (
    AVERAGE_NAME,
    EXPORT_NAME,
    GeneratorRecipe,
    GRPORecipe,
    TrainingRecipe,
    UserError,
)
from grpo.estimate import recipe_memory
from grpo.parallel import GIB, World, compute_dtype, mesh_shape

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def opening(recipe: TrainingRecipe, model: nn.Module, world: World, *, title: str) -> Iterator[str]:
    """Lines for the start: devices, model, sizes of a step, expected memory, where results go."""
    yield f"{title} on {devices(recipe, world)}, {how_computed(recipe, world)}"
    yield model_line(recipe, model)
    yield step_line(recipe, world)
    if memory := memory_line(recipe, world):
        yield memory
    yield f"results go to {recipe.run_dir}: report.html, metrics.jsonl; checkpoints to {recipe.checkpoint_dir}"


def devices(recipe: TrainingRecipe, world: World) -> str:
    """`8 x NVIDIA H200 (fsdp 8)`, `1 CPU process`."""
    if world.device.type != "cuda":
        return f"{world.size} CPU process{'es' if world.size > 1 else ''}"
    shape = mesh_shape(recipe.parallel, size=world.size, local_size=world.local_size)
    mesh = f" ({recipe.parallel.data_parallel} {' x '.join(map(str, shape))})" if world.size > 1 else ""
    return f"{world.size} x {torch.cuda.get_device_name(world.device)}{mesh}"


def how_computed(recipe: TrainingRecipe, world: World) -> str:
    """Precision, kernels, compilation."""
    mode = recipe.training.mixed_precision
    precision = "tf32" if mode == "tf32" else PRECISION[compute_dtype(mode)]
    fused = world.device.type == "cuda" and recipe.training.kernels != "reference"
    kernels = "Triton kernels" if fused else "plain torch kernels"
    compiled = getattr(getattr(recipe, "compile", None), "enabled", False)
    return f"{precision}, {kernels}{', compiled blocks' if compiled else ''}"


def model_line(recipe: TrainingRecipe, model: nn.Module) -> str:
    """Name, parameters, what an image is made of."""
    counts = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    name = recipe.model.name if hasattr(recipe, "model") else type(model).__name__.removeprefix("FSDP")
    share = "" if trained == sum(counts) else f", {in_words(trained)} of them trained"
    length, size = getattr(model.config, "block_size", None), recipe.data.image_size
    codes = f", {length} codes of {model.config.vocab_size} an image" if length else ""
    return f"{name}, {in_words(sum(counts))} parameters{share}; {size} x {size} pixels{codes}"


def step_line(recipe: TrainingRecipe, world: World) -> str:
    """Images, completions, optimizer steps of a step; how many steps."""
    steps = recipe.training.steps
    if not isinstance(recipe, GRPORecipe):
        return f"{recipe.training.images} images a step, {steps} steps"
    schedule, rollout = recipe.schedule(ranks=world.size), recipe.rollout
    drawn = rollout.batch_size * rollout.num_generations
    updates = schedule.steps_per_rollout
    several = f" in {updates} optimizer steps" if updates > 1 else ""
    guided = f", guidance {rollout.cfg_scale:g}" if rollout.cfg_scale != 1 else ""
    return (
        f"{rollout.batch_size} images x {rollout.num_generations} completions = {drawn} a step{several}, "
        f"{rollout.mode}{guided}, temperature {rollout.temperature:g}; {steps} steps"
    )


def memory_line(recipe: TrainingRecipe, world: World) -> str | None:
    """The estimate for this GPU, where there is one for the job."""
    if world.device.type != "cuda" or not isinstance(recipe, GeneratorRecipe):
        return None
    total = torch.cuda.get_device_properties(world.device).total_memory
    mesh = mesh_shape(recipe.parallel, size=world.size, local_size=world.local_size)
    try:
        peak = recipe_memory(recipe, mesh=mesh, memory=total).peak
    except UserError:  # sizes that the estimate does not know do not end a run
        return None
    return f"memory: about {peak / GIB:.0f} of {total / GIB:.0f} GiB expected on a GPU"


def closing(recipe: TrainingRecipe, best: tuple[str, float] | None) -> Iterator[str]:
    """Lines for the end: where things are, the best checkpoint with its score, and the command that uses them."""
    run_dir, average = recipe.run_dir, recipe.run_dir / AVERAGE_NAME
    yield f"the run's page: {run_dir / 'report.html'}"
    if best is not None:
        yield f"its best checkpoint: {best[0]}, {recipe.checkpoint.best_metric} {best[1]:.4g}"
    if (run_dir / EXPORT_NAME).exists():
        also = f", and their moving average, {AVERAGE_NAME}" if average.exists() else ""
        yield f"its weights: {run_dir / EXPORT_NAME}{also}"
        if isinstance(recipe, GeneratorRecipe) and recipe.tokenizer.checkpoint is not None:
            prompt = ' --sampling.prompt "..."' if recipe.model.is_text else ""
            yield f"next: grpo generate {run_dir}{prompt}"


def in_words(count: int) -> str:
    """1.41 B, 343 M, 0.9 M, 512."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= 0.1 * size:
            return f"{count / size:.3g} {unit}"
    return str(count)
