"""The bytes of a step's collectives, beside those that gloo is handed; times follow from them by arithmetic."""

import json

import pytest

from grpo.config import Parallel
from grpo.estimate import step_traffic
from tests.parallel.count_traffic import CASES, MICRO_BATCHES, training
from tests.parallel.torchrun import run_ranks
from tests.parallel.toy import make_model


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_that_are_sent(ranks, tmp_path):
    done = run_ranks(ranks, "tests/parallel/count_traffic.py", tmp_path / "counted.json")
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads((tmp_path / "counted.json").read_text())
    cases = {name: case for name, case in CASES.items() if ranks > 2 or name != "hsdp"}  # which has one copy on two
    for name, case in cases.items():
        settings = dict(case)
        samplings = settings.pop("samplings", 0)
        mesh = (ranks // 2, 2) if name == "hsdp" else (ranks,)
        traffic = step_traffic(
            make_model(),
            mesh=mesh,
            parallel=Parallel(**settings),
            training=training(),
            micro_batches=MICRO_BATCHES,
            samplings=samplings,
        )
        assert traffic._asdict() == counted[name], name
