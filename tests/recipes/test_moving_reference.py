"""A run whose state is more than weights and optimizer: moving average as reference, steered entropy, two epochs."""

import pytest
import torch

from grpo.models import GPT, MODEL_SPECS, read_weights, save_weights
from tests.parallel.torchrun import run_two_ranks
from tests.recipes.conftest import read_metrics

FLAGS = [
    "--config", "debug", "--metrics.image_interval", 0, "--data.num_workers", 0, "--checkpoint.interval", 1,
    "--rollout.num_generations", 2, "--training.batch_size", 8,
    "--rollout.mode", "autoregressive", "--reward.jpeg_size.weight", 1.0, "--training.micro_batch_size", 4,
    "--training.ema_decay", 0.9, "--training.epochs_per_rollout", 2,
    "--objective.loss", "gspo", "--objective.kl", "k3", "--objective.kl_coef", 3.0,
    "--objective.kl_level", "sequence", "--objective.reference", "ema", "--objective.entropy_weight", 2.2e-3,
    "--objective.entropy_target", 0.5, "--objective.entropy_token_share", 0.5,
]  # fmt: skip
NAMES = ("step", "loss", "grad_norm", "reward_mean", "ratio", "kl", "entropy", "entropy_weight")


def plain(lines):
    return [[line[name] for name in NAMES] for line in lines]


def files(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "model_ema.safetensors")]


@pytest.fixture
def start(tmp_path):
    """Weights whose logits differ, so that rounding does not decide which positions have the highest entropy."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "downsample_size": 4, "vocab_size": 256, "num_classes": 10}
    model = GPT(MODEL_SPECS["GPT-tiny"].config(**sizes))
    torch.nn.init.normal_(model.output.weight, std=0.2)
    save_weights(tmp_path / "start.safetensors", model.state_dict(), config=model.config)
    return tmp_path / "start.safetensors"


def test_one_and_two_ranks_resumed_and_not(run_here, tmp_path, start):
    flags = [*FLAGS, "--model.checkpoint", start]
    one = run_here("train", *flags, "--training.steps", 2, "--metrics.run_dir", tmp_path / "whole")
    broken = [*flags, "--metrics.run_dir", tmp_path / "broken"]
    run_here("train", *broken, "--training.steps", 1)
    assert plain(run_here("train", *broken, "--training.steps", 2)) == plain(one)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    weights = [line["entropy_weight"] for line in one]
    assert weights[0] != weights[1]  # the control steers
    assert all(line["kl"] > 0 for line in one)  # the average follows behind
    ends = [read_weights(tmp_path / "whole" / name) for name in ("model.safetensors", "model_ema.safetensors")]
    assert all(not ends[0][name].equal(ends[1][name]) for name in ("output.weight", "norm.weight"))

    result = run_two_ranks("tests/training/resume_on_two_ranks.py", tmp_path / "two", *flags)
    assert result.returncode == 0, result.stderr
    two = read_metrics(tmp_path / "two" / "whole")
    assert plain(read_metrics(tmp_path / "two" / "broken")) == plain(two)
    assert files(tmp_path / "two" / "broken") == files(tmp_path / "two" / "whole")
    assert plain(two) == [pytest.approx(line, rel=1e-4, abs=1e-8) for line in plain(one)]
