"""The recipe of the quickstart on Triton's interpreter (or on the GPU) beside the same on the torch reference.

Everything that a step does runs in the kernels: rollout sampling, log-probs with entropy and gradients, the loss. Sizes
are small because the interpreter runs a program a row: 16 codes an image from a codebook of 64.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdata", reason="the recipe needs its data loader")

from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, Classifier, ClassifierConfig, VQModel, save_weights

ROOT = Path(__file__).resolve().parents[2]
RUN_BOTH = """
import sys
from grpo.jobs.train_grpo import main
for kernels in ("reference", "triton"):
    main([*sys.argv[2:], "--training.kernels", kernels, "--metrics.run_dir", f"{sys.argv[1]}/{kernels}"])
"""
SIZES = {"image_size": 16, "downsample_size": 4, "codebook_size": 64}


def weights_for_the_quickstart(folder):
    """Flags that put random weights in the place of those that the quickstart has trained before."""
    torch.manual_seed(0)
    config = MODEL_SPECS["GPT-digits"].config(
        image_size=SIZES["image_size"], downsample_size=SIZES["downsample_size"], vocab_size=64, num_classes=10
    )
    policy = GPT(config)
    torch.nn.init.normal_(policy.output.weight, std=0.1)
    models = {
        "model.checkpoint": policy,
        "tokenizer.checkpoint": VQModel(TOKENIZER_SPECS["VQ-digits"].config(codebook_size=64)),
        "reward.class_log_prob.checkpoint": Classifier(ClassifierConfig(width=8)),
    }
    flags = []
    for key, model in models.items():
        path = folder / f"{key}.safetensors"
        save_weights(path, model.state_dict())
        flags += [f"--{key}", path]
    return flags


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_quickstart_learns_the_same_with_kernels_as_with_the_reference(tmp_path):
    flags = ["--config", "train_configs/quickstart/grpo.toml", *weights_for_the_quickstart(tmp_path)]
    flags += ["--data.image_size", SIZES["image_size"], "--tokenizer.codebook_size", SIZES["codebook_size"]]
    flags += ["--rollout.batch_size", 1, "--rollout.num_generations", 2, "--training.batch_size", 2]
    flags += ["--training.steps", 3, "--optimizer.warmup_steps", 0, "--optimizer.lr", 1e-2]
    flags += ["--training.mixed_precision", "fp32", "--metrics.interval", 1, "--metrics.image_interval", 0]
    flags += ["--checkpoint.interval", 0, "--checkpoint.save_final", "false"]
    done = subprocess.run(
        [sys.executable, "-c", RUN_BOTH, str(tmp_path), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    curves = [metrics(tmp_path / kernels) for kernels in ("reference", "triton")]
    assert len(curves[0]) == 3
    for reference, ours in zip(*curves, strict=True):
        # The images are the same code for code, so only the classifier's rounding is left, and that is the same too.
        assert ours["reward_mean"] == pytest.approx(reference["reward_mean"], rel=1e-6)
        for name in ("loss", "grad_norm", "entropy", "aux_ce", "surrogate", "old_log_prob_gap"):
            assert ours[name] == pytest.approx(reference[name], rel=1e-4, abs=2e-6), name
    first, last = curves[0][0], curves[0][-1]
    assert abs(last["loss"] - first["loss"]) > 1e-3  # the curve moves: a step that does nothing would pass the above
