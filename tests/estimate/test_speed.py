"""FLOPs by hand and by torch's own counter, rates of a step, the trace of a step."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grpo.config import GRPORecipe, load_recipe
from grpo.estimate import Peaks, Work, device_peaks, grpo_work, measured_peaks, throughput
from grpo.jobs.train_grpo import main
from grpo.models import GPT, GPTConfig
from grpo.models.costs import blocks_flops, extension_bytes, projection_flops
from grpo.parallel import free_memory, read_peak_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SECONDS = {"seconds/rollout": 2.0, "seconds/update": 4.0, "seconds/step": 8.0}


@pytest.fixture
def config():
    """2 blocks, D = 32, Q = 64 (one key and value head for two queries'), F = 48, T = 16, V = 64."""
    return GPTConfig(
        dim=32, n_layer=2, n_head=2, n_kv_head=1, vocab_size=64, block_size=16, num_classes=5, multiple_of=16,
        ffn_dim_multiplier=0.5,
    )  # fmt: skip


def test_flops_by_hand(config):
    assert (config.qkv_dim, config.ffn_dim) == (64, 48)
    products = 32 * 64 + 32 * 32 + 3 * 32 * 48
    assert blocks_flops(config) == 2 * (2 * 16 * products + 4 * 16 * 16 * 32)
    assert blocks_flops(config, 3) == 3 * blocks_flops(config)
    assert projection_flops(config, 10) == 2 * 10 * 32 * 64


def test_a_text_costs_its_rows_but_no_attention(config):
    text, products = replace(config, cls_token_num=9, caption_dim=3), 32 * 64 + 32 * 32 + 3 * 32 * 48
    assert blocks_flops(text, 6) == blocks_flops(config, 6) + 6 * 2 * 2 * 8 * products
    assert blocks_flops(text, 6, texts=2) == blocks_flops(config, 6) + 2 * 2 * 2 * 8 * products
    work = work_of(recipe(**AUTOREGRESSIVE | {"rollout.cfg_scale": 2}), text)  # 32 completions of 8 texts
    assert work.flops["rollout"] == blocks_flops(text, 64, texts=16) + projection_flops(text, 32 * 16)
    for micro_batch, together in ((8, 4), (6, 2), (1, 1)):
        settings = AUTOREGRESSIVE | {"training.micro_batch_size": micro_batch}
        update = blocks_flops(text, 32, texts=32 // together) + projection_flops(text, 32 * 16)
        assert work_of(recipe(**settings), text).flops["update"] == 3 * update


def test_flops_are_those_that_torch_counts(config):
    """Forward and backward, which takes twice as many, of three sequences."""
    model = GPT(config)
    tokens, class_ids = torch.zeros(3, 15, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    forward = blocks_flops(config, 3) + projection_flops(config, 3 * 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens, class_ids).sum()
        assert counter.get_total_flops() == forward
        loss.backward()
    assert counter.get_total_flops() == 3 * forward


def recipe(**changes):
    """8 images x 4 completions, 32 of them a step."""
    settings = {"rollout.batch_size": 8, "rollout.num_generations": 4, "training.batch_size": 32} | changes
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return load_recipe(GRPORecipe, ["--config", "debug", *flags])


def work_of(recipe, config, *, ranks=1):
    schedule = recipe.schedule(ranks=ranks)
    return grpo_work(recipe, config, schedule)


CONDITIONAL = {"rollout.cfg_scale": 2, "rollout.guidance_in_loss": "conditional"}
AUTOREGRESSIVE = {
    "rollout.mode": "autoregressive", "reward.reconstruction.weight": 0, "reward.class_log_prob.weight": 1,
    "reward.class_log_prob.checkpoint": "c", "objective.aux_ce_weight": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "rollout", "update"),
    [
        ({}, (8, 8), (16, 16)),  # one forward of 8 contexts serves both
        ({"objective.advantage": "batch_std"}, (8, 8), (24, 24)),  # waits for all rewards: a forward of its own
        ({"training.batch_size": 16}, (8, 8), (32, 32)),  # two steps: old log-probs are scored
        ({"training.batch_size": 2}, (8, 8), (56, 56)),  # half a group a step: twice through the model
        ({"training.epochs_per_rollout": 2}, (8, 8), (56, 56)),  # twice through the rollout: old log-probs are scored
        ({"objective.kl": "k3"}, (8, 8), (24, 24)),
        (AUTOREGRESSIVE, (32, 32), (96, 96)),
        (AUTOREGRESSIVE | {"objective.aux_ce_weight": 1}, (32, 32), (120, 120)),
        (AUTOREGRESSIVE | {"rollout.cfg_scale": 2}, (64, 32), (192, 96)),
        (AUTOREGRESSIVE | CONDITIONAL, (64, 32), (96, 96)),
    ],
)
def test_work_of_a_step(config, changes, rollout, update):
    """In forwards of one sequence through the blocks, and of its rows through the projection."""
    work = work_of(recipe(**changes), config)
    assert set(work.bytes) == ({"rollout"} if "rollout.mode" in changes else set())
    for phase, (blocks, projections) in (("rollout", rollout), ("update", update)):
        expected = blocks * blocks_flops(config) + projections * projection_flops(config, 16)
        assert work.flops[phase] == expected, phase


def test_ranks_share_the_work(config):
    alone, shared = (work_of(recipe(), config, ranks=ranks).flops for ranks in (1, 4))
    assert shared == {phase: flops / 4 for phase, flops in alone.items()}


def test_bytes_of_sampling_by_hand(config):
    """Weights of 2 blocks and of the projection in each of 16 steps, and 1 + 2 + .. + 16 rows of the caches."""
    weights = 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48) + 32 * 64
    row = 2 * 2 * 16  # keys and values of 2 layers, one head of 16
    assert extension_bytes(config, 3, dtype=torch.bfloat16) == 2 * (16 * weights + 3 * row * 136)
    work = work_of(recipe(**AUTOREGRESSIVE, **CONDITIONAL), config)
    assert work.bytes["rollout"] == extension_bytes(config, 2 * 32, dtype=torch.float32)


def test_rates_of_a_step(monkeypatch):
    work = Work({"rollout": 1e12, "update": 8e12}, {"rollout": 1e9})
    metrics = throughput(SECONDS, images=40, codes=256, work=Work(), device=CPU)
    assert (metrics["images_per_second"], metrics["tokens_per_second"]) == (5.0, 1280.0)
    assert 0.05 < metrics["memory/peak_gb"] < 1000
    assert not any(name.startswith(("mfu", "bandwidth")) for name in metrics)
    monkeypatch.setattr("grpo.estimate.speed.device_peaks", lambda device: Peaks(1e13, 1e10))
    metrics = throughput(SECONDS, images=40, codes=0, work=work, device=CPU)
    assert metrics["mfu"] == pytest.approx(9e12 / 8 / 1e13)
    assert metrics["mfu/rollout"] == pytest.approx(0.05)
    assert metrics["mfu/update"] == pytest.approx(0.2)
    assert metrics["bandwidth/rollout"] == pytest.approx(0.05)
    assert "tokens_per_second" not in metrics


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth"),
    [
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
    ],
)
def test_peaks_of_known_devices(monkeypatch, name, flops, bandwidth):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peaks(CUDA) == (flops, bandwidth)


def test_peaks_of_another_device_are_measured():
    peaks = device_peaks(CPU)
    assert 1e8 < peaks.flops < 1e14
    assert 1e8 < peaks.bandwidth < 1e13
    assert peaks is device_peaks(CPU) is measured_peaks(CPU)  # once


def test_memory_of_a_gpu(monkeypatch):
    """Free is what the driver has and what torch keeps without using it; the peak starts anew with each read."""
    readings = {
        "mem_get_info": (10, 99),
        "memory_reserved": 7,
        "memory_allocated": 4,
        "max_memory_allocated": 3 * 2**30,
    }
    for name, value in readings.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    assert free_memory(CUDA) == 13
    assert read_peak_memory(CUDA) == 3.0
    assert resets == [CUDA]


def test_a_trace_of_one_step_changes_nothing_else(tmp_path):
    flags = ["--config", "debug", "--training.steps", "3", "--metrics.image_interval", "0"]
    flags += ["--checkpoint.interval", "0", "--checkpoint.save_final", "false"]
    for name, profile in (("plain", "0"), ("traced", "2")):
        main([*flags, "--metrics.run_dir", str(tmp_path / name), "--debug.profile", profile])
    trace, table = sorted(tmp_path.rglob("trace-*"))
    assert table == trace.with_suffix(".txt")
    assert {"phase/update", "grpo::sample_tokens"} <= set(table.read_text().split())
    assert trace == tmp_path / "traced" / "trace-step-000002-rank-0.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert any(name.startswith("grpo::") for name in names)
    plain, traced = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "traced")
    )
    for before, after in zip(plain, traced, strict=True):
        assert before.keys() == after.keys()
        for name in ("loss", "grad_norm", "reward_mean", "entropy"):
            assert before[name] == after[name], name
    assert {f"seconds/{phase}" for phase in ("data", "encode", "rollout", "decode", "reward", "update")} < plain[
        0
    ].keys()
    assert {"images_per_second", "tokens_per_second", "mfu", "mfu/rollout", "mfu/update"} < plain[0].keys()
