"""Gradients of an optimizer step are reduced over ranks once, after its last micro-batch."""

import json

import pytest

from tests.parallel.torchrun import run_two_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of both ranks."""
    output = tmp_path_factory.mktemp("steps") / "outcome"
    result = run_two_ranks("tests/training/update_on_two_ranks.py", output)
    assert result.returncode == 0, result.stderr
    return [json.loads(output.with_suffix(f".{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", ["eval", "train", "twice"])
def test_accumulation_reduces_once_and_gives_the_whole_gradient(outcomes, mode):
    """With dropout too: the masks are those of the images, whichever rank has them."""
    for outcome in outcomes:
        assert outcome[mode]["reductions"] == [0, 0, 0, 4]  # three blocks and the rest, at the end
        assert outcome[mode]["error"] < 2e-5
