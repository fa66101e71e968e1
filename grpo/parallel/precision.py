"""Numeric formats of training: mixed precision, TF32, loss scaling."""

import functools
from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

MixedPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
GradPrecision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # as torch.cpu.get_capabilities names them on x86 and ARM


def compute_dtype(mixed_precision: MixedPrecision) -> torch.dtype:
    """The dtype of parameters and activations in forward and backward; a KV cache must have it too."""
    return _DTYPES[_resolved(mixed_precision)]


def mixed_precision_policy(
    mixed_precision: MixedPrecision, grad_precision: GradPrecision | None
) -> MixedPrecisionPolicy:
    """What FSDP2 casts: parameters for forward and backward, gradients for their reduction over ranks.

    The parameters that the optimizer sees, and its state, stay fp32.
    """
    dtype = compute_dtype(mixed_precision)
    return MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=_DTYPES[grad_precision or "fp32"],
    )


def set_matmul_precision(mixed_precision: MixedPrecision) -> None:
    """Allow TF32 in matrix products and convolutions unless the run is to be exact fp32.

    It also speeds up what stays fp32 under bf16 and fp16: the frozen tokenizer and the rewards.
    """
    exact = _resolved(mixed_precision) == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def grad_scaler(mixed_precision: MixedPrecision, device: torch.device) -> torch.amp.GradScaler | None:
    """Dynamic loss scaling, which fp16 gradients need (Micikevicius et al. 2018, arXiv:1710.03740); None otherwise.

    On sharded gradients it agrees over ranks on whether one overflowed.
    """
    return torch.amp.GradScaler(device.type) if mixed_precision == "fp16" else None


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this machine's device multiplies bf16 in hardware.

    A CPU without such instructions takes several times longer for bf16 than for fp32.
    """
    capabilities = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or any(capabilities.get(name) for name in _BF16_INSTRUCTIONS)


def _resolved(mixed_precision: MixedPrecision) -> MixedPrecision:
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if multiplies_bf16() else "fp32"
