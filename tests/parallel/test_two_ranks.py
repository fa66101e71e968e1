"""Two ranks give what one process gives; see `two_ranks.py` for the checks."""

import json

import pytest

from tests.parallel.torchrun import run_two_ranks
from tests.parallel.two_ranks import CHECKS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks") / "outcomes"
    result = run_two_ranks("tests/parallel/two_ranks.py", output)
    assert result.returncode == 0, result.stderr
    return [json.loads(output.with_suffix(f".{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    assert [outcome[name] for outcome in outcomes] == ["passed", "passed"]
