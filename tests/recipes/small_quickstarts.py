"""The quickstarts' own recipes with small numbers, for their tests and for a rehearsal of `benchmarks/gpu.sh`.

python tests/recipes/small_quickstarts.py class|text FOLDER
"""

import sys
from pathlib import Path

import tomli
import tomli_w

CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"
FEW = {"steps": 2, "batch_size": 8}
GROUPS = {"rollout": {"batch_size": 2, "num_generations": 4}, "training": FEW}
TOKENIZER, GENERATOR = {"name": "VQ-tiny", "codebook_size": 32}, {"name": "GPT-tiny"}
CLASS = {
    "tokenizer": {
        "tokenizer": TOKENIZER,
        "tokenizer_loss": {"unquantised_steps": 2, "codebook_ema": 0.1, "restart_threshold": 2.0},
        "training": {"steps": 4, "batch_size": 8},
    },
    "classifier_reward": {"classifier": {"width": 8}, "training": {"steps": 4, "batch_size": 8}},
    "classifier_judge": {"classifier": {"width": 8}, "training": {"steps": 4, "batch_size": 8}},
    "pretrain": {"training": {"steps": 3, "batch_size": 4}},
    "pretrain_more": {"training": {"steps": 2, "batch_size": 4}},
    "gft": {"training": FEW},
    "grpo": GROUPS,
    "grpo_vapi": GROUPS,
    "evaluate": {
        "evaluation": {"num_images": 40, "batch_size": 20},
        "sampling": {"batch_size": 20, "mixed_precision": "fp32"},
    },
}
TEXT = {
    "tokenizer": {
        "tokenizer": TOKENIZER,
        "tokenizer_loss": {"unquantised_steps": 2},
        "training": {"steps": 4, "batch_size": 8},
    },
    "reader": {"reader": {"width": 8}, "training": {"steps": 4, "batch_size": 8}},
    "pretrain": {"training": {"steps": 3, "batch_size": 4}},
    "gft": {"training": {"steps": 2, "batch_size": 4}},
    "grpo": GROUPS,
    "evaluate": {
        "evaluation": {"num_images": 56, "num_reference_images": 56, "batch_size": 28},
        "sampling": {"mixed_precision": "fp32"},
    },
    "generate": {"sampling": {"mixed_precision": "fp32"}},
}
SMALL = {"class": ("quickstart", CLASS, GENERATOR), "text": ("quickstart_text", TEXT, {**GENERATOR, "caption_dim": 32})}


def write_small(quickstart: str, folder: Path) -> Path:
    """The recipes of every phase of a quickstart, "class" or "text", into `folder`, which is returned."""
    configs, phases, generator = SMALL[quickstart]
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in phases.items():
        recipe = tomli.loads((CONFIGS / configs / f"{name}.toml").read_text())
        if "model" in recipe:
            changes = {"model": generator, "tokenizer": TOKENIZER, **changes}
        if "training" in recipe:
            changes = {**changes, "training": {**changes["training"], "mixed_precision": "fp32"}}
        for section, values in changes.items():
            recipe.setdefault(section, {}).update(values)
        (folder / f"{name}.toml").write_text(tomli_w.dumps(recipe))
    return folder


if __name__ == "__main__":
    write_small(sys.argv[1], Path(sys.argv[2]))
