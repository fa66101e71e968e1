"""Models from published weights: strict, with the sizes checked and explained in terms of the recipe."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grpo.config import UserError
from grpo.models.gpt import GPT, GPTConfig
from grpo.models.specs import MODEL_SPECS, TOKENIZER_SPECS
from grpo.models.vq import CODES_REMEMBERED, VQConfig, VQModel
from grpo.models.weight_files import read_weights

PathLike = str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)

_GPT_MARK = "tok_embeddings.weight"
_VQ_MARK = "quantize.embedding.weight"
_KINDS = {_GPT_MARK: "a class-conditional GPT", _VQ_MARK: "a VQ tokenizer"}
_KEYS = {
    "vocab_size": "tokenizer.codebook_size",
    "num_classes": "model.num_classes",
    "codebook_size": "tokenizer.codebook_size",
    "codebook_embed_dim": "tokenizer.codebook_embed_dim",
}


def load_gpt(path: PathLike, config: GPTConfig | None = None, *, bare: bool = False) -> GPT:
    """A GPT with the weights at `path` (see `read_weights`), in fp32 on the CPU, in eval mode.

    Args:
        config: the sizes to expect. None infers them (`infer_gpt_config`), with 256 codes an image: the number of
            codes is not in the weights.
        bare: insist on a bare state dict.

    Raises:
        UserError: the weights cannot be read or are not those of such a GPT.
    """
    weights = read_weights(path, bare=bare)
    _check_kind(path, weights, _GPT_MARK)
    sizes = _read_sizes(path, weights, gpt_sizes)
    if config is None:
        config = infer_gpt_config(weights)
    elif differing := {name: size for name, size in sizes.items() if size != getattr(config, name)}:
        name = _spec_name(MODEL_SPECS, {key: sizes[key] for key in ("dim", "n_layer")})
        raise UserError(_explain(path, config, differing, key="model.name", name=name))
    with torch.device("meta"):
        model = GPT(config)
    return _load(path, model, weights)


def load_vq(path: PathLike, config: VQConfig | None = None) -> VQModel:
    """A tokenizer with the weights at `path` (see `read_weights`), in fp32 on the CPU, in eval mode.

    Args:
        config: the sizes to expect. None infers them (`infer_vq_config`).

    Raises:
        UserError: the weights cannot be read or are not those of such a tokenizer.
    """
    weights = read_weights(path)
    _check_kind(path, weights, _VQ_MARK)
    weights.setdefault("quantize.codebook_used", torch.zeros(CODES_REMEMBERED))  # only training looks at it
    sizes = _read_sizes(path, weights, vq_sizes)
    if config is None:
        config = infer_vq_config(weights)
    elif differing := {name: size for name, size in sizes.items() if size != getattr(config, name)}:
        name = _spec_name(TOKENIZER_SPECS, {key: sizes[key] for key in ("ch", "ch_mult", "patch_size")})
        raise UserError(_explain(path, config, differing, key="tokenizer.name", name=name))
    with torch.device("meta"):
        model = VQModel(config)
    return _load(path, model, weights)


def gpt_sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The fields and properties of `GPTConfig` that show in the weights."""
    vocab_size, dim = weights[_GPT_MARK].shape
    return {
        "dim": dim,
        "n_layer": _count(weights, r"layers\.(\d+)\."),
        "vocab_size": vocab_size,
        "num_classes": len(weights["cls_embedding.embedding_table.weight"]) - 1,
        "ffn_dim": len(weights["layers.0.feed_forward.w1.weight"]),
        "qkv_dim": len(weights["layers.0.attention.wqkv.weight"]),
    }


def infer_gpt_config(weights: Mapping[str, Tensor]) -> GPTConfig:
    """Sizes of the GPT that `weights` belong to.

    The heads and the rotary base do not show in weights. They are those of the spec in `MODEL_SPECS` with the same
    width and depth; without one, heads have 64 dimensions and the base is 10000. The number of codes an image does not
    show either and is left at its default of 256.

    Raises:
        UserError: no known sizes lead to such weights.
    """
    sizes = gpt_sizes(weights)
    dim, n_layer = sizes["dim"], sizes["n_layer"]
    same_size = (spec for spec in MODEL_SPECS.values() if (spec.dim, spec.n_layer) == (dim, n_layer))
    spec = next(same_size, None)
    n_head = spec.n_head if spec else max(1, dim // 64)
    n_kv_head = (sizes["qkv_dim"] * n_head // dim - n_head) // 2
    config = GPTConfig(
        dim=dim,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=None if n_kv_head == n_head else n_kv_head,
        vocab_size=sizes["vocab_size"],
        num_classes=sizes["num_classes"],
        rope_base=spec.rope_base if spec else GPTConfig.rope_base,
    )
    if config.ffn_dim != sizes["ffn_dim"]:
        config = replace(config, multiple_of=sizes["ffn_dim"])
    if any(getattr(config, name) != size for name, size in sizes.items()):
        raise UserError(f"the heads of a GPT with sizes {sizes} cannot be told from its weights; pass its GPTConfig")
    return config


def vq_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `VQConfig` that show in the weights."""
    codebook_size, codebook_embed_dim = weights[_VQ_MARK].shape
    ch, pixel_channels = weights["encoder.conv_in.weight"].shape[:2]
    levels = _count(weights, r"encoder\.conv_blocks\.(\d+)\.")
    widths = [len(weights[f"encoder.conv_blocks.{level}.res.0.conv2.weight"]) for level in range(levels)]
    return {
        "codebook_size": codebook_size,
        "codebook_embed_dim": codebook_embed_dim,
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "z_channels": len(weights["encoder.conv_out.weight"]),
        "num_res_blocks": _count(weights, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "patch_size": round((pixel_channels / 3) ** 0.5),
    }


def infer_vq_config(weights: Mapping[str, Tensor]) -> VQConfig:
    """Sizes of the tokenizer that `weights` belong to.

    The groups of the normalisation do not show in weights. They are those of the spec in `TOKENIZER_SPECS` with the
    same sizes; without one, 32 as in LlamaGen.
    """
    sizes = vq_sizes(weights)
    name = _spec_name(TOKENIZER_SPECS, {key: sizes[key] for key in ("ch", "ch_mult", "z_channels", "patch_size")})
    return VQConfig(**sizes, norm_groups=TOKENIZER_SPECS[name].norm_groups if name else VQConfig.norm_groups)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Number of modules in a list, from the indices in the weights' names."""
    return 1 + max(int(found[1]) for found in (re.match(pattern, name) for name in weights) if found)


def _spec_name(specs: Mapping[str, Any], sizes: Mapping[str, Any]) -> str | None:
    """Name of the spec with these sizes, if there is one."""
    return next((name for name, spec in specs.items() if sizes.items() <= asdict(spec).items()), None)


def _check_kind(path: PathLike, weights: Mapping[str, Tensor], mark: str) -> None:
    """Raise if the weights are of another kind of model."""
    if mark in weights:
        return
    other = next((f"; they are those of {_KINDS[key]}" for key in _KINDS if key in weights), "")
    raise UserError(f"{path}: these are not the weights of {_KINDS[mark]} (no {mark}){other}")


def _read_sizes(
    path: PathLike, weights: Mapping[str, Tensor], read: Callable[[Mapping[str, Tensor]], dict[str, Any]]
) -> dict[str, Any]:
    """What `read` finds. Raises if tensors are missing from `weights`, or have shapes that say nothing."""
    try:
        return read(weights)
    except KeyError as error:
        raise UserError(f"{path}: the weights are not complete: {error.args[0]} is missing") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: the weights are not complete, or their shapes do not fit together") from error


def _explain(path: PathLike, config: Any, differing: Mapping[str, Any], *, key: str, name: str | None) -> list[str]:
    """One line for each key of the recipe behind sizes that are not as configured."""
    by_key: dict[str, list[str]] = {}
    for size in differing:
        by_key.setdefault(_KEYS.get(size, key), []).append(size)
    lines = []
    for culprit, sizes in by_key.items():
        found = ", ".join(f"{size} {differing[size]}" for size in sizes)
        wanted = ", ".join(str(getattr(config, size)) for size in sizes)
        value = name if culprit == key else differing[sizes[0]]
        remedy = f"set {culprit} = {value}" if value else f"no {culprit} has these sizes"
        lines.append(f"{path}: the weights have {found}, the recipe wants {wanted}; {remedy} or take other weights")
    return lines


def _load(path: PathLike, model: Model, weights: Mapping[str, Tensor]) -> Model:
    """Fill `model`, which is on the meta device, with all of `weights` and nothing else."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems: dict[str, Sequence[str]] = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "misshapen": [name for name in expected if name in weights and weights[name].shape != expected[name]],
    }
    told = [f"{len(names)} {problem} ({names[0]}, ...)" for problem, names in problems.items() if names]
    if told:
        raise UserError(f"{path}: the weights do not fit the model: {'; '.join(told)}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval()
