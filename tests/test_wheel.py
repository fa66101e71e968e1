"""The wheel, installed away from the checkout, runs everything by itself."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, next to the dependencies of this environment."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in ("grpo", "recipes", "train_configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)  # links stay links, as in a clone
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", str(source), *offline, "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("autoregressive_grpo-")
    install = [*pip, "install", str(wheel), *offline, "--target", str(target)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    return target


def project_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def run(installed: Path, folder: Path, *command: str, timeout: float = 240) -> str:
    """What a command prints that runs in a folder without the checkout."""
    settings = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**inherited, **settings}, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_contents(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names <= {"grpo", "bin", "__pycache__"}
    for source, copy in (("recipes", "jobs"), ("train_configs", "train_configs")):
        copied = installed / "grpo" / copy
        files = {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.*") if path.suffix != ".pyc"}
        assert {path.relative_to(copied) for path in copied.rglob("*.*") if path.suffix != ".pyc"} == files
        assert not copied.is_symlink()


def test_commands(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, sys.executable, "-c", "import grpo; print(grpo.__file__)")
    assert Path(where.strip()).parent == installed / "grpo"
    overview = run(installed, tmp_path, sys.executable, "-m", "grpo", "--help")
    program = [sys.executable, str(installed / "bin" / "grpo")]
    assert run(installed, tmp_path, *program, "--help") == overview
    assert run(installed, tmp_path, *program, "--version").split() == ["grpo", project_version()]
    debug = ["train", "--config", "debug", "--training.steps", "1"]
    run(installed, tmp_path, sys.executable, "-m", "grpo", *debug)
    assert (tmp_path / "runs" / "debug" / "metrics.jsonl").read_text().count("\n") == 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "grpo"]
    run(installed, tmp_path, *launcher, *debug, "--metrics.run_dir", "two_ranks")
    assert (tmp_path / "two_ranks" / "metrics.jsonl").exists()


def test_a_reward_of_ones_own(installed: Path, tmp_path: Path) -> None:
    """The five lines of docs/own_reward.md and the command below them."""
    page = (ROOT / "docs" / "own_reward.md").read_text()
    section = page.partition("## A reward of your own in five lines")[2]
    source, command = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "dark.py").write_text(source)
    program, *flags = command.split()
    assert program == "grpo"
    run(installed, tmp_path, sys.executable, "-m", "grpo", *flags, "--training.steps", "1")
    assert '"reward/dark_mean"' in (tmp_path / "runs" / "dark" / "metrics.jsonl").read_text()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_quickstart(installed: Path, tmp_path: Path) -> None:
    """All phases, a few steps each."""
    shutil.copytree(installed / "grpo" / "train_configs" / "quickstart", tmp_path / "configs")
    for path in (tmp_path / "configs").glob("*.toml"):
        lines = path.read_text().splitlines(keepends=True)
        short = [f"steps = {min(45, int(line.split()[2]))}\n" if line.startswith("steps =") else line for line in lines]
        path.write_text(
            "".join(short)
            .replace("num_images = 1000", "num_images = 250")
            .replace("batch_size = 250", "batch_size = 50")
        )
    run(installed, tmp_path, sys.executable, "-m", "grpo", "quickstart", "--configs", "configs", timeout=900)
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
