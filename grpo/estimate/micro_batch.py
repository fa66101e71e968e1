"""How many rows a rank computes at once, where a recipe leaves that to the memory of the GPU."""

import math
from typing import TypeVar

from grpo.config import GeneratorRecipe
from grpo.estimate.memory import models_on_meta, recipe_memory, rows_per_step

MEMORY_SHARE = 0.9  # the rest is for the CUDA context, NCCL's buffers and the fragmentation of the allocator
AnyRecipe = TypeVar("AnyRecipe", bound=GeneratorRecipe)


def on_a_gpu(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with the precision that a GPU would choose rather than this machine."""
    if recipe.training.mixed_precision != "auto":
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"mixed_precision": "bf16"})})


def with_micro_batch(recipe: AnyRecipe, *, mesh: tuple[int, ...], memory: int | None) -> AnyRecipe:
    """The recipe with a size in place of `training.micro_batch_size = 0`, and as it is where it has one.

    The size is the largest divisor of a rank's rows of an optimizer step with which each phase is expected to stay
    below nine tenths of the memory, or to need no more than with single rows, as a rollout may that fills what is free.
    So all parts are of equal size.

    Args:
        mesh: see `mesh_shape`.
        memory: free bytes of a GPU before anything is built, the least of all ranks; None on a CPU, which takes all
            rows at once.

    Raises:
        UserError: as `recipe_memory`.
    """
    if recipe.training.micro_batch_size:
        return recipe
    rows = rows_per_step(recipe, ranks=math.prod(mesh))
    sized = (_sized(recipe, rows // parts) for parts in range(1, rows + 1) if rows % parts == 0)
    if memory is None:
        return next(sized)
    models, limit = models_on_meta(recipe), MEMORY_SHARE * memory  # building them takes longer than the estimates
    single = recipe_memory(_sized(recipe, 1), mesh=mesh, memory=memory, models=models).peaks
    for each in sized:
        peaks = recipe_memory(each, mesh=mesh, memory=memory, models=models).peaks
        if all(peak <= max(limit, single[phase]) for phase, peak in peaks.items()):
            return each
    raise AssertionError("single rows need no more than single rows")


def _sized(recipe: AnyRecipe, size: int) -> AnyRecipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": size})})
