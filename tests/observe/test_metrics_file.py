"""metrics.jsonl: full precision, strict JSON, unique steps."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from grpo.observe import MetricsFile, read_metrics, write_atomically


def write_steps(path, steps, **arguments):
    stream = MetricsFile(path, **arguments)
    for step in steps:
        stream.write(step, {"loss": step / 3})
    stream.close()


def test_numbers_keep_full_precision(tmp_path):
    stream = MetricsFile(tmp_path / "metrics.jsonl")
    stream.write(1, {"loss": 1 / 3, "kl": 1e-300, "count": 2**53, "tensor": torch.tensor(0.1, dtype=torch.float64)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1 / 3, "kl": 1e-300, "count": 2.0**53, "tensor": 0.1}
    ]


def test_every_line_is_on_disk_at_once(tmp_path):
    stream = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        stream.write(step, {"loss": 0.5})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def test_what_is_not_finite_becomes_null(tmp_path):
    stream = MetricsFile(tmp_path / "metrics.jsonl")
    stream.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "kl": 0.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {"step": 1, "loss": None, "grad_norm": None, "kl": 0}


def test_a_continued_run_drops_the_lines_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, range(5, 10), start_step=4)
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 10))
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    path.write_text(path.read_text()[:-5])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    write_steps(path, range(3, 5), start_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_no_file_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("garbage", ["\0\0", "{", "[1]", "3", '{"loss": 1}', '{"step": "x"}', "[" * 100_000, "\udcff"])
def test_a_line_of_garbage_costs_that_line(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + garbage + '\n{"step": 2}\n', errors="surrogateescape")
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    MetricsFile(path, start_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_has_no_metrics(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    write_atomically(tmp_path / "page.html", "before")

    def fill(path, content, **options):
        path.open("w").write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "page.html", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "before"
