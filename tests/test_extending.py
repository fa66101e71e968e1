"""The steps of docs/extending.md for a reward and a loss, done word by word on a copy of the code."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def steps(title: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of a section: the words of each step, and its blocks by language."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = []
    for step in re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^    ```(\w+)\n(.*?)^    ```$", step, re.DOTALL | re.MULTILINE)
        found.append((step.partition("\n    ```")[0], [(kind, textwrap.dedent(code)) for kind, code in blocks]))
    return found


def changed(text: str, difference: str) -> str:
    """The text with the one place changed that a block of +, - and unchanged lines shows."""
    lines = difference.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
    assert text.count(before) == 1, before
    return text.replace(before, after)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("grpo", "recipes", "train_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(copy: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("title", "metric", "check"),
    [
        ("A reward", '"reward/brightness_mean"', "assert 'brightness' in open('docs.md').read()"),
        ("A loss", '"loss"', "assert 'unclipped: as grpo' in open('docs.md').read()"),
    ],
)
def test_the_steps_lead_there(copy: Path, title: str, metric: str, check: str) -> None:
    for words, blocks in steps(title):
        for kind, code in blocks:
            if kind == "bash":
                program, *flags = shlex.split(code)
                assert program == "grpo"
                run(copy, "-m", "grpo", *flags, "--training.steps", "1")
                (written,) = (copy / "runs").glob("*/metrics.jsonl")
                assert metric in written.read_text()
            elif kind == "diff":
                file = copy / re.search(r"`(grpo/[\w/]+\.py)`", words)[1]
                file.write_text(changed(file.read_text(), code))
            elif match := re.search(r"Write `(grpo/[\w/]+\.py)`", words):
                (copy / match[1]).write_text(code)
            else:
                run(copy, "-c", code)
    (copy / "docs.md").write_text("## Jobs\n")
    run(copy, "-m", "grpo.config", "docs.md")
    run(copy, "-c", check)


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(r"`((?:grpo|tests|docs|benchmarks)/[\w/.]+)`", PAGE)
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == {"grpo/rewards/brightness.py", "grpo/kernels/triton_NAME.py"}
