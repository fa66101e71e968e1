"""One, two and four processes and every mode of parallelism train alike; see `all_modes.py` for what they run."""

import json

import pytest
import torch

from grpo.config import Parallel, Training
from grpo.estimate import sharded_bytes
from grpo.models import GPT
from tests.parallel.all_modes import MEASURED, MEASURED_MESHES, STEPS, folder_of, modes_for
from tests.parallel.torchrun import run_ranks

PROCESSES = (1, 2, 4)
QUANTITIES = ("loss", "grad_norm", "kl", "aux_ce", "entropy", "reward_mean")
REFERENCE = "fsdp"  # on one process: the plain model in fp32

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folder of the outcomes, by number of processes."""
    folders = {}
    for processes in PROCESSES:
        folders[processes] = tmp_path_factory.mktemp(f"on-{processes}")
        result = run_ranks(processes, "tests/parallel/all_modes.py", folders[processes])
        assert result.returncode == 0, result.stderr[-5000:]
    return folders


def metrics(output, mode):
    lines = (folder_of(output, mode) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("processes", "mode"), [(n, mode) for n in PROCESSES for mode in modes_for(n)])
def test_losses_equal_those_of_the_plain_model(outputs, processes, mode):
    """To rounding: of fp32 in fp32, of the half precision in the others, where draws may differ too."""
    half = "bf16" in mode or "fp16" in mode
    reference = next((name for name in ("text", "sampled texts") if mode.startswith(name)), REFERENCE)
    expected, actual = metrics(outputs[1], reference), metrics(outputs[processes], mode)
    assert len(actual) == len(expected) == STEPS
    assert expected[-1]["kl"] > 0
    for ours, plain in zip(actual, expected, strict=True):
        assert ours["skipped_steps"] == 0
        for name in QUANTITIES:
            tolerance = {"rel": 0.05, "abs": 1e-3} if half else {"rel": 1e-5, "abs": 1e-7}
            assert ours[name] == pytest.approx(plain[name], **tolerance), name


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_same_precision_gives_the_same_losses_on_all_sizes(outputs, processes):
    for mode in {"bf16", "fp16, hsdp"} & set(modes_for(processes)):
        for ours, alone in zip(metrics(outputs[processes], mode), metrics(outputs[1], mode), strict=True):
            assert ours["reward_mean"] == pytest.approx(alone["reward_mean"], rel=1e-5)  # the same draws
            assert ours["loss"] == pytest.approx(alone["loss"], rel=2e-3)


@pytest.mark.parametrize("mesh", MEASURED_MESHES)
@pytest.mark.parametrize("processes", PROCESSES)
def test_calculated_bytes_are_the_allocated_ones(outputs, processes, mesh):
    mode, shard_size = MEASURED_MESHES[mesh]
    mesh_sizes = (processes,) if shard_size == -1 else (processes // shard_size, shard_size)
    with torch.device("meta"):
        model = GPT(MEASURED)
    calculated = sharded_bytes(
        model,
        mesh=mesh_sizes,
        parallel=Parallel(data_parallel=mode),
        training=Training(mixed_precision="fp32"),
        accumulates=False,
    )
    by_rank = [json.loads((outputs[processes] / f"allocated.{rank}.json").read_text()) for rank in range(processes)]
    largest = {name: max(sizes[mesh][name] for sizes in by_rank) for name in by_rank[0][mesh]}
    assert largest == {name: getattr(calculated, name) for name in largest}
