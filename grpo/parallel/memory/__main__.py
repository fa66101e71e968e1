"""`python -m grpo.parallel.memory --config FILE [--gpus N] [--section.key VALUE ...]`: memory of a recipe on one GPU.

--gpus N        GPUs of the run (8)
--hosts N       hosts that they are on, with the same number each (1)
--memory GIB    memory of one GPU (80)
--all-sizes     a table of all sizes of the GPT instead of the recipe's parts

Every other flag is one of the recipe. The job is that of the file, or grpo.
"""

import argparse
from collections.abc import Iterable, Sequence

from grpo.config import RECIPES, GRPORecipe, PretrainRecipe, UserError, job_of_file, load_recipe
from grpo.models import MODEL_SPECS
from grpo.parallel.launcher import run_main
from grpo.parallel.memory import GIB
from grpo.parallel.mesh import mesh_shape
from grpo.training.memory import RecipeMemory, recipe_memory

MODES = ("fsdp", "sdp", "hsdp")
SMALLEST_DIM = 768  # of the released models; the narrower ones are for tests and the quickstart


def main(arguments: Sequence[str]) -> None:
    """Print the table that the command line asks for."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return
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
    recipe = _load(rest)
    if own.all_sizes:
        _print_sizes(recipe, own)
    else:
        _print_parts(recipe, own)


def _load(arguments: Sequence[str]) -> GRPORecipe | PretrainRecipe:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config", default="")
    job = job_of_file(parser.parse_known_args(list(arguments))[0].config) or GRPORecipe.job
    if job not in (GRPORecipe.job, PretrainRecipe.job):
        raise UserError(f"--config: is a recipe of recipes/{job}.py; the estimate knows recipes of grpo and pretrain")
    recipe = load_recipe(RECIPES[job], arguments)
    if recipe.training.mixed_precision != "auto":
        return recipe
    on_a_gpu = recipe.training.model_copy(update={"mixed_precision": "bf16"})  # not what it would be on this machine
    return recipe.model_copy(update={"training": on_a_gpu})


def _estimate(recipe: GRPORecipe | PretrainRecipe, mode: str, own: argparse.Namespace) -> RecipeMemory:
    """The recipe in another mode: with its own mesh sizes where they are for that mode."""
    same = mode == recipe.parallel.data_parallel
    sizes = {} if same else {"shard_size": -1, "replicate_size": -1, "reshard_after_forward": "auto"}
    parallel = recipe.parallel.model_copy(update={"data_parallel": mode, **sizes})
    mesh = mesh_shape(parallel, size=own.gpus, local_size=own.gpus // own.hosts)
    recipe = recipe.model_copy(update={"parallel": parallel})
    return recipe_memory(recipe, mesh=mesh, memory=round(own.memory * GIB))


def _print_parts(recipe: GRPORecipe | PretrainRecipe, own: argparse.Namespace) -> None:
    estimates = [_estimate(recipe, mode, own) for mode in MODES]
    print(f"{recipe.model.name}, {own.gpus} GPUs on {own.hosts} host(s), GiB on one GPU\n")
    print(_row("", MODES))
    for name in estimates[0].lasting:
        print(_row(name, [_gib(estimate.lasting[name]) for estimate in estimates]))
    for phase, parts in estimates[0].phases.items():
        print(_row(f"in {phase}:", []))
        for name in parts:
            print(_row(f"  {name}", [_gib(estimate.phases[phase][name]) for estimate in estimates]))
    print(_row("peak", [_gib(estimate.peak) for estimate in estimates]))
    chosen = MODES.index(recipe.parallel.data_parallel)
    free = own.memory - estimates[chosen].peak / GIB
    verdict = "fits" if free >= own.memory / 10 else "is tight" if free >= 0 else "does not fit"
    print(
        f"\nThe recipe's mode, {MODES[chosen]}, {verdict}: {free:.1f} of {own.memory:g} GiB stay free for the CUDA "
        "context, NCCL\nand fragmentation, which need about a tenth. The peak is what lasts and the largest phase."
    )


def _print_sizes(recipe: GRPORecipe | PretrainRecipe, own: argparse.Namespace) -> None:
    print(f"| model | {' | '.join(MODES)} |\n|---|{'---|' * len(MODES)}")
    for name, spec in MODEL_SPECS.items():
        if spec.dim < SMALLEST_DIM:
            continue
        sized = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": name})})
        peaks = [_estimate(sized, mode, own).peak for mode in MODES]
        print(f"| {name} | {' | '.join(_gib(peak) for peak in peaks)} |")


def _row(name: str, values: Iterable[str]) -> str:
    return f"{name:24}" + "".join(f"{value:>10}" for value in values)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 9.995 * GIB else f"{size / GIB:.1f}"


if __name__ == "__main__":
    run_main(main)
