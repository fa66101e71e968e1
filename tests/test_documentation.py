"""The commands of README, CONTRIBUTING and docs/: each is run by a test, or its block says first what it needs.

A block of commands begins with `# needs ...` or `# takes ...` where a test cannot run it, with `# after the quickstart`
where tests/recipes/test_quickstart.py does. Pages of a way that is walked as a whole have their own test. All other
blocks are run here. The keys and files of all commands are checked, whether they are run or not.
"""

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from grpo.__main__ import DRY_RUN, JOBS
from grpo.config import RECIPES, load_recipe
from grpo.models import TOKENIZER_SPECS, Classifier, ClassifierConfig, VQModel, save_weights

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TESTS = {
    "own_data.md": "recipes/test_own_data.py",
    "text.md": "recipes/test_text_page.py",
    "extending.md": "test_extending.py",
    "own_reward.md": "test_wheel.py",
    "sweeps.md": "recipes/test_sweep.py",
}
"""Page -> the test that runs its commands."""
AFTER_QUICKSTART = "# after the quickstart"
SMALL = {
    "evaluate": "--evaluation.num_images 8 --evaluation.nearest_k 3 --evaluation.kid_subset_size 4",
    "generate": "--output.num_images 4",
    "train": "--training.steps 2",
}
"""Job -> flags that make its commands short, where they are not given."""


def blocks(page: Path) -> list[list[str]]:
    """The lines of each block of commands, joined where they go on."""
    found = []
    for kind, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.S | re.M):
        lines = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines()]
        if kind == "bash" or (
            not kind and any(re.match(r"(grpo|torchrun|python|make|pip) [a-z-]", line) for line in lines)
        ):
            found.append([line for line in lines if line])
    return found


ALL = [(page.name, lines) for page in PAGES for lines in blocks(page)]
MARKED = [(name, lines) for name, lines in ALL if lines[0].startswith(("# needs ", "# takes ", AFTER_QUICKSTART))]
_unmarked = [(name, lines) for name, lines in ALL if (name, lines) not in MARKED and name not in OWN_TESTS]
TO_RUN = list({"\n".join(lines): (name, lines) for name, lines in reversed(_unmarked)}.values())[::-1]
"""Each block once, on the first page that has it."""


def commands(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


def small(job: str, arguments: list[str]) -> list[str]:
    """The arguments with those of `SMALL` that they do not give."""
    words = SMALL.get(job, "").split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return [*arguments, *(word for flag, value in pairs if flag not in arguments for word in (flag, value))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: runs, a judge, results of evaluations."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        judge = Classifier(ClassifierConfig(width=8, num_classes=10))
        save_weights("judge.safetensors", judge.state_dict(), config=judge.config)
        tokenizer = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=256))
        save_weights("tokenizer.safetensors", tokenizer.state_dict(), config=tokenizer.config)
        run("grpo train --config debug --metrics.run_dir runs/mine --tokenizer.checkpoint tokenizer.safetensors")
        for name in ("one", "two", "three"):
            shutil.copytree("runs/mine", f"runs/{name}")
        evaluate = "grpo evaluate runs/mine --evaluation.feature_checkpoint judge.safetensors --evaluation.json_path"
        run(f"{evaluate} base.json")
        shutil.copy("base.json", "tuned.json")
    return folder


def run(command: str) -> None:
    """What the shell would do; jobs in this process."""
    command, _, target = command.partition(" > ")
    program, job, *arguments = shlex.split(command)
    assert program == "grpo", command
    if job == "recipes" or "--help" in arguments:
        done = subprocess.run([sys.executable, "-m", "grpo", job, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        if target:
            Path(target).write_text(done.stdout)
    elif DRY_RUN in arguments:
        import_module("grpo.training.dry_run").dry_run(job, [word for word in arguments if word != DRY_RUN])
    else:
        arguments = [word.replace("step-000100", "step-000002") for word in small(job, arguments)]
        import_module(f"grpo.jobs.{JOBS[job]}").main(arguments)


@pytest.mark.parametrize(("name", "lines"), TO_RUN, ids=[f"{name}: {lines[0][:40]}" for name, lines in TO_RUN])
def test_the_commands_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lines: list[str]
) -> None:
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for command in commands(lines):
        run(command)


def test_a_page_with_a_test_of_its_own_is_named_there() -> None:
    for page, test in OWN_TESTS.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "lines"), MARKED, ids=[f"{name}: {lines[0][:40]}" for name, lines in MARKED])
def test_commands_that_are_not_run_have_the_right_words(name: str, lines: list[str]) -> None:
    """Keys, shipped recipes, scripts, targets of make."""
    checked = 0
    for command in commands(lines):
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif words[0] == "python":
            script = (ROOT / words[1]).read_text() + (ROOT / "benchmarks" / "harness.py").read_text()
            assert all(f'"{word}"' in script for word in words if word.startswith("--")), command
        elif words[0] in ("grpo", "torchrun", "torchx"):
            check_keys(words)
        else:
            assert words[0] in {"pip", "curl", "mkdir", "for", "done", "export"}, command
        checked += 1
    assert checked


def check_keys(words: list[str]) -> None:
    """That a job takes these keys, and that the recipe is one; files need not be there."""
    if words[0] == "torchx":
        job, *flags = words[words.index("--") + 1 :]
    elif words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word == "grpo" or word.startswith("recipes/"))
        job, *flags = words[start + 1 :] if words[start] == "grpo" else ("train", *words[start + 1 :])
    else:
        job, *flags = words[1:]
    assert job in JOBS
    if job in RECIPES and flags[:1] and flags[0].startswith("--"):
        yours = next((i for i, word in enumerate(flags) if word.endswith(".toml")), None)
        flags = flags if yours is None else flags[: yours - 1] + flags[yours + 1 :]  # a recipe of the reader's
        if yours is None:
            load_recipe(RECIPES[job], flags)


def test_commands_in_the_text_have_the_right_keys() -> None:
    """`grpo JOB --key value` between the lines."""
    checked = 0
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for command in re.findall(r"`(grpo [a-z-]+ --config [^`]+)`", text):
            words = shlex.split(command.replace("\n", " "))
            if words[1] in RECIPES and not {"FILE", "NAME"} & {*words} and ".toml" not in command:
                load_recipe(RECIPES[words[1]], [word for word in words[2:] if word != DRY_RUN])
                checked += 1
    assert checked >= 3
