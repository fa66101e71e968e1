"""Weights from one layout into another: LlamaGen's .pt, .safetensors, a distributed checkpoint folder.

grpo convert --convert.input runs/mine/checkpoints/step-000100 --convert.output gpt.safetensors
grpo convert --convert.input base.pt --convert.adapter runs/mine/adapter --convert.output merged.safetensors
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("convert")

from collections.abc import Sequence

from grpo.config import ConvertRecipe, UserError, exists, load_recipe
from grpo.evaluation import make_writable
from grpo.formats import merged, read_adapter, read_config, read_weights, require_finite, save_weights


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, then the weights with their sizes, if they have any, then write them."""
    convert = load_recipe(ConvertRecipe, arguments, needs_files=True).convert
    if exists(convert.output):
        raise UserError(f"convert.output: {convert.output} exists and is not overwritten; give another name")
    make_writable(convert.output, key="convert.output")
    weights, sizes = read_weights(convert.input), read_config(convert.input)
    if convert.adapter is not None:
        weights = merged(weights, *read_adapter(convert.adapter))
    require_finite(convert.input, weights)
    save_weights(convert.output, weights, layout=convert.format, config=sizes)
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{convert.output}: {len(weights)} tensors, {parameters:,} numbers")
