"""The bytes of a step's collectives, beside those that gloo is handed; times follow from them by arithmetic."""

import json

import pytest

from grpo.config import GRPORecipe, Parallel, load_recipe
from grpo.estimate import step_seconds, step_traffic
from grpo.estimate.scaling import H100
from tests.parallel.count_traffic import CASES, MICRO_BATCHES, model_of, training
from tests.parallel.torchrun import run_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_that_are_sent(ranks, tmp_path):
    done = run_ranks(ranks, "tests/parallel/count_traffic.py", tmp_path / "counted.json")
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads((tmp_path / "counted.json").read_text())
    cases = {name: case for name, case in CASES.items() if ranks > 2 or "hsdp" not in name}  # which has one copy on two
    for name, case in cases.items():
        settings = dict(case)
        samplings = settings.pop("samplings", 0)
        mesh = (ranks // 2, 2) if "hsdp" in name else (ranks,)
        traffic = step_traffic(
            model_of(settings),  # before the settings are read, since it takes its own
            mesh=mesh,
            parallel=Parallel(**settings),
            training=training(),
            micro_batches=MICRO_BATCHES,
            samplings=samplings,
        )
        assert traffic._asdict() == counted[name], name


@pytest.mark.parametrize(("model", "layers", "products"), [("GPT-XXL", 48, 1.3844e9), ("GPT-7B", 32, 6.5431e9)])
def test_seconds_by_hand(model, layers, products):
    """16 images of 576 codes on each of 8 GPUs: products of a row, attention, what the host needs, pixels."""
    dim, rows = {"GPT-XXL": 1536, "GPT-7B": 4096}[model], 16 * 576
    forward = 2 * products * rows + 4 * rows * 576 * dim * layers
    for mode, passes in (("selective", 3), ("full", 4)):  # forward, backward twice as much; the forward again
        flags = ["--model.name", model, "--training.micro_batch_size", "16", "--activation_checkpoint.mode", mode]
        recipe = load_recipe(GRPORecipe, ["--config", "published/vapi_xxl_384_one_gpu", *flags])
        seconds, _ = step_seconds(recipe, mesh=(8,), hosts=1)
        computed = forward / 0.49 / H100.flops + passes * forward / 0.46 / H100.flops
        assert seconds.generator == pytest.approx(max(computed, layers * 5.4e-3), rel=1e-3)
        assert seconds.rewards == pytest.approx(16 * (0.25 / 128 + 8 * 2.51 / 1024), rel=1e-6)
        assert seconds.waiting == 0
