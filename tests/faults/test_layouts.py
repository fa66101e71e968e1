"""Other numbers of ranks and other layouts: the state element by element, and the order of the data."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from grpo.observe import read_metrics
from grpo.parallel import distributed
from tests.checkpoint.training import managed, save, start, train, whole_state
from tests.faults.runs import ROOT, drawn, run, starts

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def load_on(ranks, *arguments):
    """Run tests/checkpoint/layouts.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    result = subprocess.run(
        [sys.executable, *launcher, "tests/checkpoint/layouts.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


def test_weights_and_optimizer_survive_every_change_of_layout(tmp_path):
    """1 -> 2 -> 4 -> 2 ranks, and fsdp, sdp, hsdp and plain replicas into each other."""
    with distributed(60) as world, managed(tmp_path / "one", world) as manager:
        training = start(world)
        train(world, training, range(3))
        save(manager, training, 3)
        torch.save(whole_state(training), tmp_path / "one.pth")
    load_on(2, tmp_path, "-on-two", "one")
    load_on(4, tmp_path, "-on-four", "fsdp-on-two", "hsdp-on-two")
    load_on(2, tmp_path, "-again", "fsdp-on-four", "hsdp-on-four")
    with distributed(60) as world, managed(tmp_path / "hsdp-on-four", world) as manager:
        again = start(world)
        manager.load(manager.resume_point(), model=again[0], optimizer=again[1])
        expected, found = torch.load(tmp_path / "hsdp-on-four.pth"), whole_state(again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_data_go_on_without_gap_or_repeat(tmp_path, quiet):
    """The run of two ranks, gone on with on one, on four and on two again; eight images a step throughout."""
    folder = tmp_path / "run"
    shutil.copytree(quiet / "checkpoints" / "step-000003", folder / "checkpoints" / "step-000003")
    assert run(folder, "--training.steps", 6, ranks=1).returncode == 0
    result = run(folder, "--training.steps", 9, ranks=4)
    assert result.returncode == 0, result.stderr
    result = run(folder, "--parallel.data_parallel", "hsdp", "--parallel.shard_size", 1)
    assert result.returncode == 0, result.stderr
    assert starts(folder) == [3, 6, 9]

    expected = {sample: found[0][0] for sample, found in drawn(quiet).items() if sample >= 3 * 8}
    found = drawn(folder)
    assert sorted(found) == list(range(3 * 8, 12 * 8))
    assert {sample: [place for place, _ in what] for sample, what in found.items()} == {
        sample: [place] for sample, place in expected.items()
    }
    lines = (read_metrics(folder / "metrics.jsonl"), read_metrics(quiet / "metrics.jsonl")[3:])
    for ours, theirs in zip(*lines, strict=True):
        for name in ("step", "loss", "grad_norm", "aux_ce"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (ours["step"], name)
