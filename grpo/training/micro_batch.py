"""What a run says and does where its recipe leaves the size of a micro-batch to the memory of the GPU."""

from grpo.config import TrainingRecipe
from grpo.estimate import with_micro_batch
from grpo.parallel import GIB, World, all_reduce_max, free_memory, mesh_shape


def sized_for(recipe: TrainingRecipe, world: World) -> tuple[TrainingRecipe, list[str]]:
    """The recipe with the micro-batch that fits the GPUs of all ranks, and a line that says so. Collective.

    Nothing may be on the GPU yet. The free memory, and so the size, may be another one when a run goes on; that changes
    nothing but rounding. On a CPU it is always the whole batch.
    """
    if recipe.training.micro_batch_size:
        return recipe, []
    memory = -all_reduce_max(-free_memory(world.device)) if world.device.type == "cuda" else None
    return chosen(recipe, world, memory=memory)


def chosen(recipe: TrainingRecipe, world: World, *, memory: int | None) -> tuple[TrainingRecipe, list[str]]:
    """The same for ranks that have `memory` bytes each, None for CPUs."""
    if recipe.training.micro_batch_size:
        return recipe, []
    mesh = mesh_shape(recipe.parallel, size=world.size, local_size=world.local_size)
    recipe = with_micro_batch(recipe, mesh=mesh, memory=memory)
    why = "all of a rank, on a CPU" if memory is None else f"what fits into {memory / GIB:.0f} GiB of a GPU"
    return recipe, [f"training.micro_batch_size = 0: {recipe.training.micro_batch_size} rows at once, {why}"]
