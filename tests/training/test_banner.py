"""What a run says at its start and at its end."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo.config import GRPORecipe, PretrainRecipe
from grpo.parallel import World
from grpo.training.banner import closing, in_words, opening


class Network(nn.Linear):
    config = SimpleNamespace(block_size=64, vocab_size=256)


def recipe(kind=GRPORecipe, **sections):
    base = {"data": {"name": "synthetic", "image_size": 32}, "tokenizer": {"name": "VQ-tiny"}}
    return kind.model_validate({**base, "model": {"name": "GPT-tiny"}, **sections})


def world(device="cpu", size=1):
    return World(rank=0, size=size, local_rank=0, local_size=size, device=torch.device(device))


def test_the_opening_has_the_sizes_of_a_step():
    rollout = {"batch_size": 20, "num_generations": 8}
    given = recipe(rollout=rollout, training={"batch_size": 80, "steps": 60, "mixed_precision": "bf16"})
    network = Network(100, 100, bias=False)
    lines = list(opening(given, network, world(size=2), title="GRPO"))
    assert lines[0] == "GRPO on 2 CPU processes, bf16, plain torch kernels"
    assert lines[1] == "GPT-tiny, 10000 parameters; 32 x 32 pixels, 64 codes of 256 an image"
    assert "20 images x 8 completions = 160 a step in 2 optimizer steps, teacher_forced" in lines[2]
    assert str(given.run_dir) in lines[-1]
    network.requires_grad_(False)
    assert "0 of them trained" in list(opening(given, network, world(), title="GRPO"))[1]


def test_other_jobs_count_images():
    given = recipe(PretrainRecipe, training={"batch_size": 32, "steps": 9})
    assert list(opening(given, Network(2, 2), world(), title="Pre-training"))[2] == "32 images a step, 9 steps"


def test_a_gpu_is_told_what_memory_is_expected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    given = recipe(tokenizer={"name": "VQ-16"}, model={"name": "GPT-B"})
    lines = list(opening(given, Network(2, 2), world("cuda", size=8), title="GRPO"))
    assert lines[0].startswith("GRPO on 8 x NVIDIA H200 (fsdp 8), ")
    assert "Triton kernels" in lines[0]
    assert any(line.startswith("memory: about ") and "of 80 GiB" in line for line in lines)


def test_the_closing_names_what_is_there(tmp_path):
    given = recipe(metrics={"run_dir": str(tmp_path)}, tokenizer={"name": "VQ-tiny", "checkpoint": "vq.pt"})
    assert len(list(closing(given, None))) == 1
    (tmp_path / "model.safetensors").touch()
    assert list(closing(given, ("c/step-000100", 3.25)))[1] == "its best checkpoint: c/step-000100, reward_mean 3.25"
    assert list(closing(given, None))[-1] == f"next: grpo generate {tmp_path}"


@pytest.mark.parametrize(
    ("count", "words"), [(512, "512"), (99_999, "99999"), (165_000, "0.165 M"), (1.41e9, "1.41 B"), (343e6, "0.343 B")]
)
def test_numbers_in_words(count, words):
    assert in_words(int(count)) == words
