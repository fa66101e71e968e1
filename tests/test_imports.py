"""The architecture: imports go one way and in no circle, and importing the package costs nothing optional."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package may import from lower tiers only, never from its own or a higher one. The jobs are the folder recipes/,
# which an installed package has as grpo.jobs; the command `grpo`, which starts them, knows them by name only.
TIERS = [
    {"config", "environment", "restarts", "position"},
    {"kernels"},
    {"parallel"},
    {"formats"},
    {"models"},
    {"texts", "shapes"},
    {"rewards", "data"},
    {"rollout", "objectives", "checkpoint", "observe", "evaluation"},
    {"estimate", "sharing"},
    {"training"},
    {"jobs"},
]
TIER = {package: height for height, packages in enumerate(TIERS) for package in packages}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "grpo").rglob("*.py"))
    if "jobs" not in file.relative_to(ROOT).parts
} | {f"grpo.jobs.{file.stem}": file for file in sorted((ROOT / "recipes").glob("*.py"))}


def imported_modules(file: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it; fails on relative imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    assert not any(name.split(".")[0] == "recipes" for name in found), f"{file}: jobs are imported as grpo.jobs"
    return {name for name in found if name.split(".")[0] == "grpo"}


def imported_packages(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(file) if "." in name}


def test_every_package_has_a_tier():
    inside = (ROOT / "grpo").iterdir()
    found = {path.stem for path in inside if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert found - {"__init__", "__main__"} == set(TIER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    package = (*module.split("."), "")[1]
    height = TIER.get(package, len(TIERS))  # grpo/__main__.py, the command
    for other in imported_packages(MODULES[module]) - {package, "__main__"}:
        assert TIER[other] < height, f"{module} imports grpo.{other}"


def test_there_is_no_circle_of_imports():
    """Not between packages and not inside one; a package's own `__init__` only gathers what its files offer."""
    graph = {
        module: {name for name in imported_modules(file) if name in MODULES and name != "grpo.__main__"}
        for module, file in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_files_are_imported_through_their_package_or_by_their_own():
    """A file never takes a name from its own package's `__init__`, which imports that file."""
    for module, file in MODULES.items():
        assert ".".join(module.split(".")[:2]) not in imported_modules(file) or module.count(".") == 1, module


PLAIN_MODELS = ("condition", "condition_rows", "generator", "kv_cache", "gpt", "vq")


@pytest.mark.parametrize("name", PLAIN_MODELS)
def test_models_know_nothing_of_the_project(name):
    imported = imported_modules(ROOT / "grpo" / "models" / f"{name}.py")
    assert imported <= {f"grpo.models.{other}" for other in PLAIN_MODELS}


def test_kernels_import_nothing_of_the_project():
    for file in (ROOT / "grpo" / "kernels").rglob("*.py"):
        assert imported_packages(file) <= {"kernels"}, file


def test_only_models_name_a_family():
    """What is outside `models` takes any generator."""
    for module, file in MODULES.items():
        if not module.startswith("grpo.models"):
            names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
            assert not names & {"GPT", "GPTConfig", "load_gpt"}, module


def test_nobody_edits_the_path_or_names_an_issue():
    for folder in ("grpo", "recipes", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            if file != Path(__file__):
                assert not re.search(r"sys\.path(\[0\] =|\.(insert|append))", text), file
                assert not re.search(r"\bissue \d", text, re.IGNORECASE), file


def test_importing_everything_needs_neither_triton_nor_wandb():
    """With triton and wandb made unimportable, as on a machine without them, every package still imports."""
    packages = ", ".join(f"grpo.{package}" for package in TIER)
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('triton', 'wandb'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"import grpo, {packages}\n"
        "assert 'triton' not in sys.modules and 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
