"""The recipes of train_configs/text/ in miniature: small networks with random weights, all else as published."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import GRPORecipe, load_recipe
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, VQModel, save_weights
from tests.recipes.test_published import server, words  # noqa: F401, fixtures
from tests.vgg import save_vgg16

COMMAND = (
    "--image-size 32 --downsample-size 4 --gpt-model GPT-tiny --vq-model VQ-tiny --codebook-size 64 "
    "--sample-batch-size 4 --train-batch-size 2 --gradient-accumulation-steps 4 --num-generations 2 --epochs 2 "
    "--lr 1e-4 --clip-range 0.2 --aux-ce-weight 0.1 --use-token-noise --token-noise-prob 0.5 --num-workers 0 "
    "--sample-model-mode train --dropout-p 0.1 --token-dropout-p 0.2 --uncond-prob 0.1 --data-start 1 --data-end 2 "
    "--mixed-precision fp32 --log-image-every 0 --global-seed 1"
)
"""Flags of the reference's text-to-image trainer, of a small run."""

PROMPTS = ["a red dot", "a blue square above a red dot", "two green rings", "a dog"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags that make a recipe small: models, images, steps; texts by words in place of a T5."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "downsample_size": 4, "vocab_size": 64, "cls_token_num": 120, "caption_dim": 2048}
    generator = GPT(MODEL_SPECS["GPT-tiny"].config(**sizes))
    torch.nn.init.normal_(generator.output.weight, std=0.1)
    save_weights(folder / "gpt.pt", generator.state_dict())
    save_weights(folder / "vq.pt", VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=64)).state_dict())
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        "--model.name", "GPT-tiny", "--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", folder / "vq.pt",
        "--tokenizer.codebook_size", 64, "--tokenizer.downsample_size", 4, "--data.image_size", 32,
        "--data.num_workers", 0, "--training.steps", 2, "--metrics.image_interval", 0, "--checkpoint.interval", 0,
        "--text.encoder", "words", "--checkpoint.save_final", "false", "--model.checkpoint", folder / "gpt.pt",
    ]  # fmt: skip


def prompts_of(small):
    return ["--data.path", small[-1].parent / "prompts.txt"]


def check(lines, name):
    rewards = load_recipe(GRPORecipe, ["--config", f"text/{name}"]).reward.active
    assert len(lines) == 2
    for line in lines:
        wanted = ["loss", "grad_norm", "entropy", *(f"reward/{reward}_std" for reward in rewards)]
        assert all(math.isfinite(line[metric]) for metric in wanted)
        assert line["grad_norm"] > 0
        assert line["skipped_steps"] == 0


def test_vapi(run_here, small, tmp_path):
    flags = [
        "--reward.lpips.backbone",
        save_vgg16(tmp_path / "vgg.pth"),
        "--data.name",
        "digits",
        "--data.path",
        "none",
    ]
    flags += ["--rollout.batch_size", 4, "--training.batch_size", 32, "--training.micro_batch_size", 2]
    lines = run_here("train", "--config", "vapi_t2i", *small, *flags, "--metrics.run_dir", tmp_path / "run")
    check(lines, "vapi_t2i")
    assert all(line["ratio"] == 1 for line in lines)
    assert all(line["reward/lpips_std"] > 0 for line in lines)


def test_ar_grpo(run_here, small, words, server, tmp_path):  # noqa: F811
    from tests.rewards.test_maniqa import released

    torch.save({"params": released()}, tmp_path / "maniqa.pth")
    flags = [*words(["clip", "clip_levels"], ["hps_v2", "hps_levels"]), "--reward.qwen.url", server]
    flags += ["--reward.maniqa.checkpoint", tmp_path / "maniqa.pth", *prompts_of(small)]
    run = ["--config", "ar_grpo_t2i_xl_256", *small, *flags, "--metrics.run_dir", tmp_path / "run"]
    lines = run_here("train", *run)
    check(lines, "ar_grpo_t2i_xl_256")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_ranke(run_here, small, words, tmp_path):  # noqa: F811
    flags = [*words(["clip"], []), *prompts_of(small), "--rollout.batch_size", 4, "--training.batch_size", 32]
    run = ["--config", "ranke_t2i_xl_256", *small, *flags, "--metrics.run_dir", tmp_path / "run"]
    lines = run_here("train", *run)
    check(lines, "ranke_t2i_xl_256")


@pytest.mark.parametrize("stage", [1, 2])
def test_pretraining(run_here, small, tmp_path, stage):
    flags = [
        "--data.name",
        "synthetic",
        "--data.path",
        "none",
        "--training.batch_size",
        8,
        "--compile.enabled",
        "false",
    ]
    start = small[:-2] if stage == 1 else small  # stage 1 begins with random weights
    run = ["--config", f"pretrain_stage{stage}", *start, *flags, "--metrics.run_dir", tmp_path / "run"]
    lines = run_here("pretrain", *run)
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_the_text_trainers_command(run_here, small, tmp_path):
    """Its flags with LlamaGen's lists and features, of which the update drops some; the ratio stays 1."""
    (tmp_path / "lists").mkdir()
    for name in ("a", "b", "c"):
        entries = []
        for number in range(4):
            Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(tmp_path / f"{name}{number}.png")
            entries.append({"image_path": str(tmp_path / f"{name}{number}.png"), "text": ["a dot. It is red.", "dot"]})
            for kind, rows in (("long", 5), ("short", 2)):
                (tmp_path / kind / name).mkdir(parents=True, exist_ok=True)
                features = np.random.default_rng(number).normal(size=(1, rows, 2048)).astype(np.float32)
                np.save(tmp_path / kind / name / f"{number}.npy", features)
        (tmp_path / "lists" / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    files = {"--vq-ckpt": "vq.pt", "--gpt-ckpt": "gpt.pt"}
    flags = [word for flag, name in files.items() for word in (flag, small[-1].parent / name)]
    folders = {"--data-path": "lists", "--t5-feat-path": "long", "--short-t5-feat-path": "short"}
    flags += [word for flag, name in folders.items() for word in (flag, tmp_path / name)]
    flags += ["--reward.lpips.backbone", save_vgg16(tmp_path / "vgg.pth"), "--metrics.run_dir", tmp_path / "run"]
    lines = run_here("train", *COMMAND.split(), *flags)
    assert [line["ratio"] for line in lines] == [1, 1]
    assert all(line["reward/lpips_mean"] < 0 and line["grad_norm"] > 0 for line in lines)
    assert all(line["old_log_prob_gap"] > 0.001 for line in lines)  # dropout's: the rollout had none
