"""`grpo JOB --dry-run`: what a recipe would do, told without doing it."""

import math
from collections.abc import Iterator, Sequence

import torch

from grpo.config import (
    RECIPES,
    ClassifierRecipe,
    GeneratorRecipe,
    GRPORecipe,
    ReaderRecipe,
    TokenizerRecipe,
    TrainingRecipe,
    load_recipe,
    of_run,
)
from grpo.estimate import RecipeMemory, models_on_meta, on_a_gpu, recipe_memory
from grpo.models import Classifier, VQModel, tokenizer_sizes
from grpo.parallel import GIB, World, compute_dtype, free_memory, launched_world, mesh_shape
from grpo.rewards import check_rewards
from grpo.shapes import Reader
from grpo.training.banner import opening
from grpo.training.build import classifier_sizes, reader_sizes
from grpo.training.micro_batch import chosen

ASSUMED_MEMORY = 80 * GIB  # of the GPU that a machine without one plans for


def dry_run(job: str, arguments: Sequence[str]) -> None:
    """Check the recipe and its files; print parameters, sizes of a step, memory by part, and doubts.

    The model is built on the meta device, without memory; no weights, images or processes are touched. Under torchrun
    the sizes are those of its ranks.

    Raises:
        UserError: as the job itself would at its start, or the job does not train.
    """
    draws = "sampling" in RECIPES[job].model_fields
    words = of_run(RECIPES[job], arguments) if draws else arguments
    recipe = load_recipe(RECIPES[job], words, needs_files=True)
    world = launched_world()
    if not isinstance(recipe, TrainingRecipe):
        print(f"the recipe of grpo {job} is valid, and its files are there")
        return
    if isinstance(recipe, GRPORecipe):
        check_rewards(recipe.reward, has_prompts=recipe.model.caption_dim is not None)
    memory = free_memory(world.device) if world.device.type == "cuda" else ASSUMED_MEMORY
    lines = [*opening(recipe, on_meta(recipe), world, title=f"dry run of grpo {job}")]
    notes = [*recipe.notes(), *recipe.remarks()]
    if isinstance(recipe, GeneratorRecipe):
        planned, sizes = chosen(on_a_gpu(recipe), world, memory=memory)
        mesh = mesh_shape(recipe.parallel, size=world.size, local_size=world.local_size)
        lines += _memory_lines(recipe_memory(planned, mesh=mesh, memory=memory))
        notes = [*sizes, *notes]
    notes += doubts(recipe, world) if isinstance(recipe, GRPORecipe) else ()
    lines += [f"note: {note}" for note in notes]
    if world.is_main:
        print("\n".join([*lines, "the recipe is valid and its files are there; nothing was started"]))


def on_meta(recipe: TrainingRecipe) -> torch.nn.Module:
    """The model that a recipe trains, without memory. Raises a UserError: its sizes do not fit together."""
    with torch.device("meta"):
        if isinstance(recipe, GeneratorRecipe):
            return models_on_meta(recipe)[0]
        if isinstance(recipe, ClassifierRecipe):
            return Classifier(classifier_sizes(recipe))
        if isinstance(recipe, ReaderRecipe):
            return Reader(reader_sizes(recipe))
        assert isinstance(recipe, TokenizerRecipe)
        return VQModel(tokenizer_sizes(recipe.tokenizer))


def _memory_lines(memory: RecipeMemory) -> Iterator[str]:
    """The peak on one GPU, its largest parts, and the keys that lower the largest."""
    name, phase = max(memory.phases.items(), key=lambda entry: sum(entry[1].values()))
    parts = {**memory.lasting, **{f"{part} of {name}": size for part, size in phase.items()}}
    largest = sorted(parts.items(), key=lambda entry: -entry[1])[:3]
    unit, scale = ("GiB", GIB) if memory.peak >= GIB else ("MiB", GIB / 1024)
    told = ", ".join(f"{part} {size / scale:.3g}" for part, size in largest)
    yield f"memory: about {memory.peak / scale:.3g} {unit} on a GPU at its peak, in {name}; most of it: {told}"
    yield f"less: {_KNOBS.get(largest[0][0].partition(' of ')[0], _SHARDING)}"


_SHARDING = 'more GPUs with parallel.data_parallel = "fsdp", or a smaller model.name'
_KNOBS = {
    "activations": "a smaller training.micro_batch_size, or activation_checkpoint.mode selective or full",
    "logits": "a smaller training.micro_batch_size",
    "decoding": "a smaller reward.batch_size",
    "encoding": "a smaller training.micro_batch_size",
    "cache": "a smaller rollout.max_rows",
    "copied weights": "a smaller rollout.keep_memory",
}


def doubts(recipe: GRPORecipe, world: World) -> Iterator[str]:
    """Settings that are valid and cannot work as their author may think."""
    rollout, objective, training = recipe.rollout, recipe.objective, recipe.training
    schedule = recipe.schedule(ranks=world.size)
    group, narrowest = rollout.num_generations, min(objective.clip_low, objective.clip_high)
    rounding = torch.finfo(compute_dtype(training.mixed_precision)).eps / 2  # of what the log-probs are made of
    if schedule.on_policy:
        yield (
            "a rollout feeds one optimizer step, so ratios are 1 and objective.clip_range never acts; "
            "training.batch_size below the completions of a rollout makes several"
        )
    elif objective.loss != "gspo" and narrowest < rounding:
        yield (
            f"objective.clip_range = {narrowest:g} is below what the precision rounds by ({rounding:.1g}): "
            "noise decides what is clipped"
        )
    largest = (group - 1) / math.sqrt(group)
    if objective.advantage == "group_std" and objective.advantage_clip >= largest:
        yield (
            f"objective.advantage_clip = {objective.advantage_clip:g} never acts: with {group} completions no "
            f"standardised advantage exceeds {largest:.2f}"
        )
    if rollout.top_k == 1:
        yield "rollout.top_k = 1 draws the same completion each time: rewards have no spread and give no gradient"
    elif rollout.temperature < 0.1:
        yield f"rollout.temperature = {rollout.temperature:g} leaves hardly any spread among completions"
    if group < 4:
        yield f"rollout.num_generations = {group} makes a noisy baseline; 8 or more is usual"
    if not recipe.optimizer.lr:
        yield "nothing is trained: optimizer.lr is 0"
