"""The commands of docs/text.md, one after the other, on small weights."""

import json
import re
import shlex
from contextlib import chdir
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from grpo.__main__ import JOBS
from grpo.models import read_weights
from grpo.texts import FeatureStore
from tests.texts.tiny_t5 import WIDTH, save_tiny_t5

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/text.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SMALL = {job: flags.split() for job, flags in re.findall(r"^\| `grpo (\w+)` \| `(.+)` \|$", PAGE, re.MULTILINE)}
"""Job -> the page's flags for weights that are small."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the page asks for, small."""
    pytest.importorskip("transformers", reason="the extra [text] is not installed")
    torch.manual_seed(0)
    (stand_ins,) = (text for language, text in BLOCKS if language == "python")
    with chdir(tmp_path):
        exec(compile(stand_ins, "docs/text.md", "exec"), {})
    save_tiny_t5(tmp_path / "pretrained" / "flan-t5-xl")
    (tmp_path / "my_images").mkdir()
    for number in range(9):
        Image.new("RGB", (40, 32), (28 * number, 0, 60)).save(tmp_path / "my_images" / f"{number:04d}.jpg")
        (tmp_path / "my_images" / f"{number:04d}.txt").write_text(f"a red circle\nphoto number {number}\n")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    entry = {"tag": "colors", "include": [], "prompt": "a red circle"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(entry) + "\n")
    (tmp_path / "results.jsonl").write_text('{"tag": "colors", "metadata": "m", "correct": true}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """What the shell would do, in this process; flags of the page for small weights come last, and win."""
    _, job, *arguments = shlex.split(command)
    small = SMALL.get(job, [])
    at_end = set(small[::2])
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    kept = [word for flag, value in pairs if flag not in at_end for word in (flag, value)]
    import_module(f"grpo.jobs.{JOBS[job]}").main([*kept, *small])


def test_every_command_of_the_page(place):
    listed = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("grpo ")]
    assert [shlex.split(line)[1] for line in listed] == [
        *["encode-text", "encode-text", "pretrain", "train", "generate", "generate", "generate", "evaluate"]
    ]
    for command in listed:
        run(command)
    store = FeatureStore(place / "features", rows=16, width=WIDTH)
    assert store.missing(["a red circle", "photo number 8", "two blue squares"]) == []
    before, after = (read_weights(place / "runs" / name / "model.safetensors") for name in ("finetune", "grpo"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len(list((place / "images").iterdir())) == 4
    assert (place / "geneval_images" / "00000" / "samples" / "0003.png").is_file()
    assert json.loads((place / "evaluation.json").read_text())["metrics"]["geneval"]["overall"] == 1
    for name in re.findall(r"^\| `(text/[^|]+)` \|", PAGE, re.MULTILINE):
        for recipe in name.replace("`", "").split(", "):
            assert (ROOT / "train_configs" / f"{recipe}.toml").is_file(), recipe
