"""Weights from one layout into another: LlamaGen's .pt, .safetensors, a distributed checkpoint folder.

python recipes/convert.py --convert.input runs/mine/checkpoints/step-000100 --convert.output gpt.safetensors
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # recipes/grpo.py would be imported in place of the package grpo
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from grpo.config import ConvertRecipe, UserError, load_recipe
from grpo.models import read_weights, save_weights
from grpo.parallel import run_main


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, then the weights, then write them."""
    convert = load_recipe(ConvertRecipe, arguments).convert
    if Path(convert.output).exists():
        raise UserError(f"convert.output: {convert.output} exists and is not overwritten; give another name")
    weights = read_weights(convert.input)
    try:
        save_weights(convert.output, weights, layout=convert.format)
    except OSError as error:
        raise UserError(f"convert.output: {convert.output} cannot be written: {error.strerror}") from error
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{convert.output}: {len(weights)} tensors, {parameters:,} numbers")


if __name__ == "__main__":
    run_main(main)
