"""The command `grpo`: its help is cheap, its mistakes are told in a line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.__main__ import JOBS
from grpo.config import RECIPES

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "triton", "wandb", "datasets", "numpy", "grpo.parallel")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_jobs_have_recipes_and_scripts() -> None:
    assert JOBS.keys() - RECIPES.keys() == {"quickstart", "memory", "doctor", "compare", "sweep"}
    assert RECIPES.keys() <= JOBS.keys()
    assert {f"{module}.py" for module in JOBS.values()} == {path.name for path in (ROOT / "recipes").glob("[!_]*.py")}


def test_help_lists_every_job_with_a_line() -> None:
    done = run("-m", "grpo", "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    for job in JOBS:
        (line,) = [line for line in lines if line.startswith(f"  {job} ")]
        assert line.endswith(".")
    assert run("-m", "grpo").stdout == done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([job, "--help"] for job in JOBS),
        ["train", "--help", "objective", "data"],
        ["recipes"],
        ["trian"],
    ],
    ids=" ".join,
)
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from grpo.__main__ import main\n"
        f"sys.argv = ['grpo', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        f"    loaded = sorted({{*sys.modules}} & {{*{HEAVY!r}}})\n"
        "    assert not loaded, loaded\n"
        "    sys.exit(end.code)\n"
    )
    done = run("-c", code)
    assert done.returncode == (2 if arguments == ["trian"] else 0), done.stderr
    assert (done.stderr if arguments == ["trian"] else done.stdout).strip()


def test_help_of_one_kind_of_reward() -> None:
    done = run("-m", "grpo", "train", "--help", "reward.jpeg_size")
    titles = [line.partition("]")[0] for line in done.stdout.splitlines() if line.startswith("[")]
    assert titles == ["[reward.jpeg_size"], done.stderr
    assert "--reward.jpeg_size.weight" in done.stdout


@pytest.mark.parametrize("module", ["torch", "grpo.rewards"])
def test_an_interrupt_during_imports_is_quiet(module: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "from grpo.__main__ import run_job\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "run_job('train', ['--config', 'debug'])\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (130, "")


def test_importing_the_package_needs_nothing_heavy() -> None:
    code = f"import sys, grpo, grpo.config; assert not {{*sys.modules}} & {{*{HEAVY!r}}}"
    assert run("-c", code).returncode == 0


def test_shipped_recipes_are_listed_and_printed() -> None:
    names = run("-m", "grpo", "recipes").stdout.split()
    assert {"c2i_b_256", "own_classes/pretrain", "published/vapi_xxl_384"} <= {*names}
    printed = run("-m", "grpo", "recipes", "own_classes/pretrain").stdout
    assert printed == (ROOT / "train_configs/own_classes/pretrain.toml").read_text(encoding="utf-8")


def test_the_schema_of_a_job_is_printed() -> None:
    assert json.loads(run("-m", "grpo", "recipes", "--schema", "convert").stdout)["properties"]["convert"]


def test_scripts_give_the_same_help() -> None:
    by_script, by_command = run("recipes/train_grpo.py", "--help"), run("-m", "grpo", "train", "--help")
    assert by_script.returncode == 0, by_script.stderr
    assert by_script.stdout == by_command.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "trian: unknown job; did you mean train?"),
        (["xyz"], "xyz: unknown job; there are train, pretrain, "),
        (["train", "--help", "optimiser"], "--help optimiser: no section of this job; did you mean optimizer"),
        (["convert", "--convert.inputs", "a"], "--convert.inputs: unknown flag; did you mean --convert.input?"),
        (
            ["recipes", "own_classes/pretrian"],
            "did you mean the shipped recipe own_classes/pretrain?",
        ),
        (["recipes", "a", "b"], "recipes takes one name"),
        (["recipes", "--schema", "trian"], "--schema takes one job: train, "),
        (["train", "--config", "quickstart/pretrain"], "is a recipe of `grpo pretrain`, not of `grpo train`"),
    ],
)
def test_mistakes_end_with_a_line_and_code_2(arguments: list[str], line: str) -> None:
    done = run("-m", "grpo", *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert "Traceback" not in done.stderr
