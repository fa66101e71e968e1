"""Tiny generators with random weights, as a run leaves them and as Python makes them."""

from pathlib import Path

import torch

from grpo.config import GRPORecipe
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, VQModel, save_weights

SIZES = {"image_size": 16, "downsample_size": 4, "vocab_size": 32}
NAMES = ("cat", "dog", "dog")


def tiny_gpt(**others: object) -> GPT:
    """Of 16 codes, with three classes unless `others` say otherwise."""
    torch.manual_seed(0)
    given = {"num_classes": 3, "class_names": NAMES} if "caption_dim" not in others else {}
    gpt = GPT(MODEL_SPECS["GPT-tiny"].config(**SIZES, **given, **others))
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    return gpt


def tiny_tokenizer() -> VQModel:
    torch.manual_seed(1)
    return VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32))


def run_folder(folder: Path) -> Path:
    """What `grpo train` leaves behind, as far as others read it."""
    folder.mkdir(parents=True)
    gpt, tokenizer = tiny_gpt(), tiny_tokenizer()
    save_weights(folder / "model.safetensors", gpt.state_dict(), config=gpt.config)
    save_weights(folder / "vq.safetensors", tokenizer.state_dict(), config=tokenizer.config)
    recipe = GRPORecipe.model_validate(
        {
            "data": {"name": "classes", "image_size": 16, "classes": "all"},
            "model": {"name": "GPT-tiny", "num_classes": 3, "checkpoint": "/home/me/secret/base.pt"},
            "tokenizer": {
                "name": "VQ-tiny",
                "checkpoint": str(folder / "vq.safetensors"),
                "codebook_size": 32,
                "downsample_size": 4,
            },
            "rollout": {"mode": "autoregressive", "cfg_scale": 2.0, "temperature": 0.5},
            "reward": {"jpeg_size": {}},
            "training": {"mixed_precision": "fp32"},
        }
    )
    (folder / "recipe.toml").write_text(recipe.to_toml())
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "grad_norm": 1.0, "reward_mean": 0.25}\n')
    return folder
