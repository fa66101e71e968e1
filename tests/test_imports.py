"""The architecture: imports go one way, and importing the package costs nothing optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package may import from lower tiers only, never from its own or a higher one. A `__main__.py` is a program like
# those in recipes/: nobody imports it, so it stands above all packages, wherever its name puts it.
TIERS = [
    {"config"},
    {"kernels"},
    {"parallel"},
    {"models"},
    {"rewards", "data"},
    {"rollout", "objectives", "checkpoint", "observe", "evaluation"},
    {"training"},
]
TIER = {package: height for height, packages in enumerate(TIERS) for package in packages}
FILES = sorted((ROOT / "grpo").rglob("*.py"))


def imported_packages(file: Path) -> set[str]:
    """Packages of the project that a file imports, anywhere in it; fails on relative imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "grpo" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("grpo.")}
        assert not any(name.split(".")[0] == "recipes" for name in names), f"{file}: the package imports a recipe"
    return found


def test_every_package_has_a_tier():
    packages = {path.name for path in (ROOT / "grpo").iterdir() if (path / "__init__.py").exists()}
    assert packages == set(TIER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    package = file.relative_to(ROOT / "grpo").parts[0]
    if package == "__init__.py":
        assert imported_packages(file) == set()
        return
    if file.name == "__main__.py":
        assert imported_packages(file) <= set(TIER)
        return
    for other in imported_packages(file) - {package}:
        assert TIER[other] < TIER[package], f"{file.relative_to(ROOT)} imports grpo.{other}"


def test_nobody_imports_a_program():
    programs = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES if file.name == "__main__.py"}
    for file in FILES:
        assert not any(program in file.read_text() for program in programs), file


@pytest.mark.parametrize("name", ["gpt.py", "vq.py"])
def test_models_know_nothing_of_the_project(name):
    assert imported_packages(ROOT / "grpo" / "models" / name) == set()


def test_kernels_import_nothing_of_the_project():
    for file in (ROOT / "grpo" / "kernels").rglob("*.py"):
        assert imported_packages(file) <= {"kernels"}, file


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
