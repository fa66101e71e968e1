"""Memory that the training of a generator takes on one GPU; needs neither a GPU nor the recipe's files.

grpo memory --config published/vapi_xxl_384 --gpus 8
grpo memory --config FILE --gpus 16 --hosts 2 --memory 80 --section.key VALUE
grpo memory --config FILE --all-sizes

--config NAME|FILE  the recipe
--gpus N            GPUs of the run (8)
--hosts N           hosts that they are on, with the same number each (1)
--memory GIB        memory of one GPU (80)
--all-sizes         a table of all sizes of the generator instead of the recipe's parts

Every other flag is one of the recipe, of `train`, `pretrain`, `distill` or `finetune`. The job is that of the file, or
train.
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("memory")

import argparse
from collections.abc import Iterable, Sequence

from grpo.config import RECIPES, GeneratorRecipe, GRPORecipe, UserError, job_of_file, load_recipe
from grpo.estimate import RecipeMemory, on_a_gpu, recipe_memory, step_seconds, with_micro_batch
from grpo.models import MODEL_SPECS
from grpo.parallel import GIB, mesh_shape

MODES = ("fsdp", "sdp", "hsdp")
SMALLEST_DIM = 768  # of the released models; the narrower ones are for tests and the quickstart


def main(arguments: Sequence[str]) -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--memory", type=float, default=80.0)
    parser.add_argument("--all-sizes", action="store_true")
    try:
        own, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if own.gpus < 1 or own.hosts < 1 or own.gpus % own.hosts:
        raise UserError(f"--gpus {own.gpus} must be a multiple of --hosts {own.hosts}, both positive")
    if not 0 < own.memory <= 1e6:  # NaN is neither
        raise UserError(f"--memory {own.memory} must be the GiB of one GPU, more than 0")
    recipe = load(rest)
    (print_sizes if own.all_sizes else print_parts)(recipe, own)


def load(arguments: Sequence[str]) -> GeneratorRecipe:
    """The recipe, with the precision that a GPU would choose rather than this machine."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config", default="")
    job = job_of_file(parser.parse_known_args(list(arguments))[0].config) or GRPORecipe.job
    if not issubclass(RECIPES[job], GeneratorRecipe):
        raise UserError(f"--config: is a recipe of grpo {job}; the estimate knows recipes that train a generator")
    return on_a_gpu(load_recipe(RECIPES[job], arguments))


def in_mode(recipe: GeneratorRecipe, mode: str, own: argparse.Namespace) -> tuple[GeneratorRecipe, tuple[int, ...]]:
    """The recipe in a mode, with its own mesh sizes where they are for that mode, and the mesh."""
    same = mode == recipe.parallel.data_parallel
    sizes = {} if same else {"shard_size": -1, "replicate_size": -1, "reshard_after_forward": "auto"}
    parallel = recipe.parallel.model_copy(update={"data_parallel": mode, **sizes})
    mesh = mesh_shape(parallel, size=own.gpus, local_size=own.gpus // own.hosts)
    recipe = recipe.model_copy(update={"parallel": parallel})
    return with_micro_batch(recipe, mesh=mesh, memory=round(own.memory * GIB)), mesh


def estimate(recipe: GeneratorRecipe, mode: str, own: argparse.Namespace) -> tuple[int, RecipeMemory]:
    """Rows at once in a mode, and what the recipe then takes."""
    recipe, mesh = in_mode(recipe, mode, own)
    return recipe.training.micro_batch_size, recipe_memory(recipe, mesh=mesh, memory=round(own.memory * GIB))


def print_parts(recipe: GeneratorRecipe, own: argparse.Namespace) -> None:
    """Each part of the recipe's memory, for each mode."""
    rows, estimates = zip(*(estimate(recipe, mode, own) for mode in MODES), strict=True)
    print(f"{recipe.model.name}, {own.gpus} GPUs on {own.hosts} host(s), GiB on one GPU\n")
    print_row("", MODES)
    print_row("rows at once", map(str, rows))
    for name in estimates[0].lasting:
        print_row(name, [gib(each.lasting[name]) for each in estimates])
    for phase, parts in estimates[0].phases.items():
        print_row(f"in {phase}:", [])
        for name in parts:
            print_row(f"  {name}", [gib(each.phases[phase][name]) for each in estimates])
    print_row("peak", [gib(each.peak) for each in estimates])
    chosen = MODES.index(recipe.parallel.data_parallel)
    free = own.memory - estimates[chosen].peak / GIB
    verdict = "fits" if free >= own.memory / 10 else "is tight" if free >= 0 else "does not fit"
    room = f"{free:.1f} of {own.memory:g} GiB stay free" if free >= 0 else f"{-free:.1f} GiB are missing, beside those"
    print(
        f"\nThe recipe's mode, {MODES[chosen]}, {verdict}: {room} for the CUDA context, NCCL\n"
        "and fragmentation, which need about a tenth. The peak is what lasts and the largest phase."
    )
    if isinstance(recipe, GRPORecipe) and recipe.rollout.mode == "teacher_forced":
        print_time(recipe, own)


def print_time(recipe: GRPORecipe, own: argparse.Namespace) -> None:
    """What a step of the recipe's own mode would take on H100s, by the model of docs/scaling.md."""
    recipe, mesh = in_mode(recipe, recipe.parallel.data_parallel, own)
    if not recipe.schedule(ranks=own.gpus).on_policy:
        return  # several optimizer steps a rollout
    seconds, traffic = step_seconds(recipe, mesh=mesh, hosts=own.hosts)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds._asdict().items())
    sent = ", ".join(f"{getattr(traffic, name) / 1e9:.1f} GB {name}" for name in ("gathered", "reduced", "averaged"))
    print(f"\nA step on H100s, estimated: {seconds.total:.2f} s ({parts}), with {sent}.")


def print_sizes(recipe: GeneratorRecipe, own: argparse.Namespace) -> None:
    """The peak of each released size of the generator, for each mode."""
    print(f"| model | {' | '.join(MODES)} |\n|---|{'---|' * len(MODES)}")
    for name, spec in MODEL_SPECS.items():
        if spec.dim < SMALLEST_DIM:
            continue
        sized = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": name})})
        peaks = [estimate(sized, mode, own)[1].peak for mode in MODES]
        print(f"| {name} | {' | '.join(gib(peak) for peak in peaks)} |")


def print_row(name: str, values: Iterable[str]) -> None:
    """A line of a table."""
    print(f"{name:24}" + "".join(f"{value:>10}" for value in values))


def gib(size: int) -> str:
    """Bytes in GiB, with three digits."""
    return f"{size / GIB:.2f}" if size < 9.995 * GIB else f"{size / GIB:.1f}"
