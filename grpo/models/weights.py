"""Models from published weights: strict, with the sizes checked and explained in terms of the recipe."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from grpo.config import Tokenizer, UserError
from grpo.formats import read_config, read_weights, require_finite, saved_fields
from grpo.models.class_names import class_count_problem
from grpo.models.gpt import GPT, GPTConfig
from grpo.models.specs import GPT_SPECS, TOKENIZER_SPECS, tokenizer_sizes
from grpo.models.vq import CODES_REMEMBERED, VQConfig, VQModel

LARGEST_SIZE = 2**20  # of what a file says of itself: beyond, it is not the size of a model
PathLike = str | os.PathLike[str]
Config = TypeVar("Config")

_CLASS_TABLE = "cls_embedding.embedding_table.weight"  # [num_classes + 1, D], the last row is unconditional
_TEXT_MARK, _NULL_TEXT = "cls_embedding.cap_proj.fc1.weight", "cls_embedding.uncond_embedding"  # [D, C], [P, C]
_NAMES = "class_names"
_REMEDIES = {
    "vocab_size": "set tokenizer.codebook_size = {}",
    "num_classes": "set model.num_classes = {}",
    "block_size": "set the image size to that of {} codes",
    "cls_token_num": "set model.cls_token_num = {}",
    "caption_dim": "set model.caption_dim = {} and take features of that width",
    "codebook_size": "set tokenizer.codebook_size = {}",
    "codebook_embed_dim": "set tokenizer.codebook_embed_dim = {}",
}
"""What to do about a size that the recipe names by itself; the others come with the name of a spec."""
_OTHER_CONDITION = {
    True: "the weights are of a text-conditional GPT, the recipe wants a class-conditional one; set "
    "model.cls_token_num = {cls_token_num} and model.caption_dim = {caption_dim}",
    False: "the weights are of a class-conditional GPT, the recipe wants a text-conditional one; leave out "
    "model.caption_dim and model.cls_token_num",
}


def load_gpt(path: PathLike, config: GPTConfig | None = None, *, bare: bool = False, new_classes: int = 0) -> GPT:
    """A GPT with the weights at `path` (see `read_weights`, also for `bare`), in fp32 on the CPU, in eval mode.

    Args:
        config: the sizes to expect; None takes those written with the weights (`save_weights`).
        new_classes: of the classes of `config`, the last ones, which the weights do not have. Their embeddings are
            copies of the unconditional one, which moves to the end. The weights' own classes come before them, or are
            left out where all classes are new.

    Raises a UserError: the weights cannot be read, are not those of such a GPT, or nothing says their sizes.
    """
    weights = read_weights(path, bare=bare)
    if not new_classes:
        return _build(_GPT, path, weights, config)
    assert config is not None, "new classes need a config that counts them"
    assert config.caption_dim is None, "a text-conditional model has no classes"
    kept = config.num_classes - new_classes
    found = len(weights[_CLASS_TABLE]) - 1 if _CLASS_TABLE in weights else kept
    if kept not in (0, found):
        raise UserError(class_count_problem(path, found=found, wanted=kept, new=new_classes))
    model = _build(_GPT, path, weights, replace(config, num_classes=found, class_names=None))
    table = model.state_dict()[_CLASS_TABLE]  # [found + 1, D]
    with torch.device("meta"):
        wider = GPT(config)
    rows = torch.cat([table[:kept], table[found:].expand(new_classes + 1, -1)])
    wider.load_state_dict(model.state_dict() | {_CLASS_TABLE: rows}, assign=True)
    return wider.eval()


def load_vq(path: PathLike, config: VQConfig | None = None) -> VQModel:
    """A tokenizer with the weights at `path`, otherwise as `load_gpt`."""
    weights = read_weights(path)
    weights.setdefault("quantize.codebook_used", torch.zeros(CODES_REMEMBERED))  # only training looks at it
    return _build(_VQ, path, weights, config)


def build_tokenizer(section: Tokenizer, *, device: torch.device, seed: int = 0) -> VQModel:
    """The frozen tokenizer of a recipe, whole on every rank; random weights when it names no checkpoint."""
    sizes = tokenizer_sizes(section)
    if section.checkpoint is not None:
        model = load_vq(section.checkpoint, sizes)
    else:
        torch.manual_seed(seed)
        model = VQModel(sizes)
    return model.to(device).eval().requires_grad_(False)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the weights, by name, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _gpt_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields and properties of `GPTConfig` that show in the weights."""
    vocab_size, dim = weights[_GPT.mark].shape
    if _TEXT_MARK in weights:
        rows, width = weights[_NULL_TEXT].shape
        condition: dict[str, int | None] = {"cls_token_num": rows, "caption_dim": width}
    else:
        condition = {"num_classes": len(weights[_CLASS_TABLE]) - 1, "cls_token_num": 1, "caption_dim": None}
    return condition | {
        "dim": dim,
        "n_layer": _count(weights, r"layers\.(\d+)\."),
        "vocab_size": vocab_size,
        "ffn_dim": len(weights["layers.0.feed_forward.w1.weight"]),
        "qkv_dim": len(weights["layers.0.attention.wqkv.weight"]),
    }


def _vq_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `VQConfig` that show in the weights."""
    codebook_size, codebook_embed_dim = weights[_VQ.mark].shape
    codebook = {"codebook_size": codebook_size, "codebook_embed_dim": codebook_embed_dim}
    if "encoder.layers.0.weight" in weights:
        return codebook | {
            "ch": len(weights["decoder.norm_out.weight"]),
            "ch_mult": (1,),
            "z_channels": len(weights["encoder.layers.4.weight"]),
            "num_res_blocks": _count(weights, r"decoder\.conv_blocks\.0\.res\.(\d+)\.") - 1,
            "patch_size": round((len(weights["decoder.conv_out.weight"]) / 3) ** 0.5),
            "patch_encoder": True,
        }
    ch, pixel_channels = weights["encoder.conv_in.weight"].shape[:2]
    levels = _count(weights, r"encoder\.conv_blocks\.(\d+)\.")
    widths = [len(weights[f"encoder.conv_blocks.{level}.res.0.conv2.weight"]) for level in range(levels)]
    return codebook | {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "z_channels": len(weights["encoder.conv_out.weight"]),
        "num_res_blocks": _count(weights, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "patch_size": round((pixel_channels / 3) ** 0.5),
        "patch_encoder": False,
    }


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Number of modules in a list, by the different indices in the weights' names."""
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


class _Kind(NamedTuple):
    """What distinguishes the weights of one kind of model."""

    what: str
    mark: str  # a tensor that only this kind has
    model: type[nn.Module]
    config: type
    sizes: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    specs: Mapping[str, Any]
    key: str  # of the recipe, that names the spec
    example: str


_GPT = _Kind("a GPT", "tok_embeddings.weight", GPT, GPTConfig, _gpt_sizes, GPT_SPECS, "model.name",
             'load_gpt(path, MODEL_SPECS["GPT-B"].config(image_size=256))')  # fmt: skip
_VQ = _Kind("a VQ tokenizer", "quantize.embedding.weight", VQModel, VQConfig, _vq_sizes, TOKENIZER_SPECS,
            "tokenizer.name", 'load_vq(path, TOKENIZER_SPECS["VQ-16"].config())')  # fmt: skip


def _build(kind: _Kind, path: PathLike, weights: dict[str, Tensor], config: Any) -> Any:
    """The model of these weights. What differs is found before anything is allocated."""
    if kind.mark not in weights:
        other = next((f"; they are those of {other.what}" for other in (_GPT, _VQ) if other.mark in weights), "")
        if any(".lora_A." in name for name in weights):
            other = "; they are a LoRA adapter's: give its folder as model.adapter and its base as model.checkpoint"
        raise UserError(f"{path}: these are not the weights of {kind.what} (no {kind.mark}){other}")
    try:
        found = kind.sizes(weights)
    except KeyError as error:
        raise UserError(f"{path}: the weights are not complete: {error.args[0]} is missing") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: the weights are not complete, or their shapes do not fit together") from error
    own = read_sizes(path, kind.config, what=kind.what)
    if own is not None:
        if any(getattr(own, name) != size for name, size in found.items()):
            raise UserError(f"{path}: damaged, the sizes that are written with the weights are not theirs")
        found |= {field.name: getattr(own, field.name) for field in fields(own) if field.compare}
        if kind is _GPT and own.caption_dim is not None:
            del found["num_classes"]  # it has none
    elif config is None:
        raise UserError(f"{path}: nothing in it says its sizes; pass a config, such as {kind.example}")
    config = config or own
    if kind is _GPT and (config.caption_dim is None) != (found["caption_dim"] is None):
        raise UserError(f"{path}: {_OTHER_CONDITION[config.caption_dim is None].format(**found)} or take other weights")
    if differing := {name: size for name, size in found.items() if size != getattr(config, name)}:
        raise UserError(_explain(kind, path, config, differing, found))
    with torch.device("meta"):
        model = kind.model(config)
    expected = model.state_dict()
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "misshapen": [name for name in weights if name in expected and weights[name].shape != expected[name].shape],
        "without floats": [name for name in expected if name in weights and not weights[name].is_floating_point()],
    }
    if told := [f"{len(names)} {problem} ({names[0]}, ...)" for problem, names in problems.items() if names]:
        raise UserError(f"{path}: the weights do not fit the model: {'; '.join(told)}")
    require_finite(path, weights)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval()


def read_sizes(path: PathLike, config: type[Config], *, what: str) -> Config | None:
    """The sizes that were written with the weights of `what`; None if there are none. A UserError if damaged."""
    if (sizes := read_config(path)) is None:
        return None
    try:
        if unknown := sizes.keys() - set(saved_fields(config)):
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        lists = [value if isinstance(value, list) else [value] for name, value in sizes.items() if name != _NAMES]
        numbers = [number for values in lists for number in values if not isinstance(number, bool)]
        if not all(number is None or 0 < number <= LARGEST_SIZE for number in numbers):  # NaN is neither
            raise ValueError(f"a size that is not in 0 .. {LARGEST_SIZE}")
        return TypeAdapter(config).validate_json(json.dumps(sizes), strict=True)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, or from a later version: no sizes of {what} ({reason})") from error


def _explain(kind: _Kind, path: PathLike, config: Any, differing: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line for each key of the recipe behind sizes that are not as configured."""
    by_spec = f"no {kind.key} has these sizes"
    for name, spec in kind.specs.items():
        if all(size == getattr(spec.config(), field) for field, size in found.items() if field not in _REMEDIES):
            by_spec = f"set {kind.key} = {name}"
    by_remedy: dict[str, list[str]] = {}
    for size in differing:
        by_remedy.setdefault(_REMEDIES.get(size, by_spec).format(differing[size]), []).append(size)
    lines = []
    for remedy, sizes in by_remedy.items():
        has = ", ".join(f"{size} {differing[size]}" for size in sizes)
        wanted = ", ".join(str(getattr(config, size)) for size in sizes)
        lines.append(f"{path}: the weights have {has}, the recipe wants {wanted}; {remedy} or take other weights")
    return lines
