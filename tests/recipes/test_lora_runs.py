"""Runs that train a LoRA adapter: what they keep, what they leave, and what can be made of it."""

import json

import pytest
import torch
from torch.testing import assert_close

from grpo.config import UserError
from grpo.formats import merged, read_adapter, read_tensors
from grpo.jobs import convert, generate
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, VQModel, load_gpt, read_weights, save_weights

SIZES = {"image_size": 32, "downsample_size": 4, "vocab_size": 256, "num_classes": 10}
LORA = ("--lora.rank", 2, "--lora.targets", "wqkv,w2", "--optimizer.lr", 1e-2)
AVERAGE = ("--training.ema_decay", 0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights of a small generator and a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    generator = GPT(MODEL_SPECS["GPT-tiny"].config(**SIZES))
    torch.nn.init.normal_(generator.output.weight, std=0.2)
    save_weights(folder / "gpt.safetensors", generator.state_dict(), config=generator.config)
    tokenizer = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=256))
    save_weights(folder / "vq.safetensors", tokenizer.state_dict(), config=tokenizer.config)
    return folder


@pytest.fixture
def flags(base):
    """flags(flag, ...): those of three steps with an adapter and checkpoints, and others."""
    weights = ("--tokenizer.checkpoint", base / "vq.safetensors")
    checkpoints = ("--checkpoint.interval", 1, "--checkpoint.keep_last", 0, "--metrics.image_interval", 0)

    def make(*own, steps=3, lora=LORA, model=base / "gpt.safetensors"):
        return (*weights, "--model.checkpoint", model, *lora, *checkpoints, "--training.steps", steps, *own)

    return make


GRPO = ("--config", "debug", "--objective.kl", "k3", "--objective.kl_coef", 0.1)


def curve(lines):
    return [[float(line[name]).hex() for name in ("loss", "kl", "grad_norm", "aux_ce")] for line in lines]


def test_what_a_run_leaves(run_here, base, flags, tmp_path):
    lines = run_here("train", *GRPO, *flags(*AVERAGE, "--metrics.run_dir", tmp_path))
    assert lines[0]["kl"] == 0  # the reference is the same model without its adapter, which begins as nothing
    assert lines[2]["kl"] > 0
    checkpoint = tmp_path / "checkpoints/step-000003"
    weights, (adapter, matrices) = read_weights(base / "gpt.safetensors"), read_adapter(checkpoint)
    assert (adapter.rank, adapter.alpha, adapter.base) == (2, 4, str(base / "gpt.safetensors"))
    assert {name.split(".")[3] for name in matrices} == {"wqkv", "w2"}
    stored = read_tensors(checkpoint)
    assert {name.split(".", 1)[1] for name in stored if name.startswith("model.")} == set(matrices)
    assert all("lora_" in name for name in stored)  # the optimizer's and the average's too
    assert not (checkpoint / "consolidated.pth").exists()
    state = json.loads((checkpoint / "run_state.json").read_text())
    assert len(state["run"]["fingerprints"]["model.checkpoint"]["sha256"]) == 64

    for name, folder in (("model", "adapter"), ("model_ema", "adapter_ema")):
        exported = read_weights(tmp_path / f"{name}.safetensors")
        assert_close(exported, merged(weights, *read_adapter(tmp_path / folder)), rtol=0, atol=0)
        assert load_gpt(tmp_path / f"{name}.safetensors").config.block_size == 64
    assert_close(read_adapter(tmp_path / "adapter")[1], matrices, rtol=0, atol=0)
    exported = read_weights(tmp_path / "model.safetensors")
    changed = {name for name in exported if not torch.equal(exported[name], weights[name])}
    assert {name.split(".")[3] for name in changed} == {"wqkv", "w2"}


def test_a_run_in_two_halves_is_the_whole_one(run_here, flags, tmp_path):
    whole = run_here("train", *GRPO, *flags(*AVERAGE, "--metrics.run_dir", tmp_path / "whole"))
    for steps in (1, 3):
        lines = run_here("train", *GRPO, *flags(*AVERAGE, "--metrics.run_dir", tmp_path / "halves", steps=steps))
    assert curve(lines) == curve(whole)
    for name in ("model", "model_ema"):
        one, other = (read_weights(tmp_path / run / f"{name}.safetensors") for run in ("whole", "halves"))
        assert_close(one, other, rtol=0, atol=0)


def test_another_base_is_noticed(run_here, base, flags, tmp_path):
    weights = read_weights(base / "gpt.safetensors")
    save_weights(tmp_path / "gpt.safetensors", weights)
    there = {"model": tmp_path / "gpt.safetensors"}
    run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path / "run", steps=1, **there))
    weights["norm.weight"] = weights["norm.weight"] * 1.5
    save_weights(tmp_path / "gpt.safetensors", weights)
    with pytest.raises(UserError) as caught:
        run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path / "run", **there))
    assert "model.checkpoint: other contents since the checkpoint was written" in caught.value.problems


@pytest.mark.parametrize(
    ("job", "own"),
    [
        ("pretrain", ()),
        ("distill", ("--distill.cfg_scale", 2)),
        ("finetune", ("--finetune.loss", "cca")),
        ("finetune", ("--finetune.loss", "gft")),
        ("train", ("--rollout.mode", "autoregressive", "--rollout.cfg_scale", 1.5, "--reward.log_ratio.weight", 1)),
        ("train", ("--training.mixed_precision", "bf16", "--activation_checkpoint.mode", "selective")),
        ("train", ("--training.ema_decay", 0.5, "--objective.reference", "ema", "--objective.kl", "k3")),
    ],
)
def test_every_job_trains_one(run_here, base, flags, tmp_path, job, own):
    sizes = ("--model.name", "GPT-tiny", "--model.num_classes", 10, "--tokenizer.name", "VQ-tiny")
    sizes += ("--tokenizer.codebook_size", 256, "--tokenizer.downsample_size", 4, "--data.name", "synthetic")
    sizes += ("--data.image_size", 32, "--data.num_workers", 0, "--training.mixed_precision", "fp32")
    start = ("--config", "debug", "--objective.aux_ce_weight", 0) if job == "train" else sizes
    batch = () if job == "train" else ("--training.batch_size", 8)
    lines = run_here(job, *start, *batch, *flags(*own, "--metrics.run_dir", tmp_path))
    assert len(lines) == 3
    assert all(0 < line["grad_norm"] < 100 for line in lines[1:])
    weights = read_weights(base / "gpt.safetensors")
    assert_close(
        read_weights(tmp_path / "model.safetensors"),
        merged(weights, *read_adapter(tmp_path / "adapter")),
        rtol=0,
        atol=0,
    )


def test_images_from_an_adapter_are_those_of_the_merged_weights(run_here, base, flags, tmp_path, monkeypatch):
    """By `generate` with the adapter, by `convert` with it, and by the weights that the run has merged."""
    run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path, lora=("--lora.rank", 2, "--optimizer.lr", 0.3)))
    merged_by_hand = tmp_path / "merged.safetensors"
    convert.main([
        *("--convert.input", str(base / "gpt.safetensors"), "--convert.adapter", str(tmp_path / "adapter")),
        *("--convert.output", str(merged_by_hand)),
    ])  # fmt: skip
    assert_close(read_weights(merged_by_hand), read_weights(tmp_path / "model.safetensors"), rtol=0, atol=0)
    images = {}
    places = {
        "merged": (merged_by_hand, None),
        "adapter": (base / "gpt.safetensors", tmp_path / "checkpoints/step-000003"),
        "base": (base / "gpt.safetensors", None),
    }
    for name, (weights, adapter) in places.items():
        chosen = [] if adapter is None else ["--model.adapter", str(adapter)]
        generate.main([
            *("--model.name", "GPT-tiny", "--model.checkpoint", str(weights), "--model.num_classes", "10", *chosen),
            *("--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", str(base / "vq.safetensors")),
            *("--tokenizer.codebook_size", "256", "--tokenizer.downsample_size", "4", "--sampling.image_size", "32"),
            *("--sampling.mixed_precision", "fp32", "--output.num_images", "6"),
            *("--output.grid", f"{tmp_path}/{name}.png"),
        ])  # fmt: skip
        images[name] = (tmp_path / f"{name}.png").read_bytes()
    assert images["merged"] == images["adapter"] != images["base"]


def test_an_adapter_is_trained_further(run_here, base, flags, tmp_path):
    run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path / "first"))
    further = ("--model.adapter", tmp_path / "first/adapter")
    lines = run_here("train", *GRPO, *flags(*further, "--metrics.run_dir", tmp_path / "second"))
    assert lines[0]["kl"] > 0  # to the base
    assert "the frozen reference is model.checkpoint without it" in (tmp_path / "second/log.txt").read_text()
    with pytest.raises(UserError, match=r"it takes lora.rank = 2, lora.alpha = 4, lora.targets = w2,wqkv"):
        run_here("train", *GRPO, *flags(*further, "--metrics.run_dir", tmp_path / "third", lora=("--lora.rank", 3)))


def test_an_adapter_is_not_weights(run_here, base, flags, tmp_path):
    run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path, steps=1))
    for place in ("adapter", "checkpoints/step-000001"):
        with pytest.raises(UserError, match=r"LoRA adapter's: give its folder as model.adapter"):
            load_gpt(tmp_path / place)


def test_two_ranks_do_as_one(run_here, run_on_two, base, flags, tmp_path):
    one = run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path / "one"))
    two = run_on_two("train", *GRPO, *flags("--metrics.run_dir", tmp_path / "two"))
    for name in ("loss", "kl", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-3, abs=1e-6), name
    ours, theirs = (read_adapter(tmp_path / run / "adapter")[1] for run in ("one", "two"))
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # and one goes on from what two have written
    lines = run_here("train", *GRPO, *flags("--metrics.run_dir", tmp_path / "two", steps=4))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
