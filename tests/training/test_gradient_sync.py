"""Gradients of an optimizer step are reduced over ranks once, after its last micro-batch."""

import json

from tests.parallel.torchrun import run_two_ranks


def test_accumulation_reduces_once_and_gives_the_whole_gradient(tmp_path):
    result = run_two_ranks("tests/training/update_on_two_ranks.py", tmp_path / "outcome")
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        outcome = json.loads((tmp_path / f"outcome.{rank}").read_text())
        assert outcome["reductions"] == [0, 0, 0, 4]  # three blocks and the rest, at the end
        assert outcome["error"] < 2e-5
