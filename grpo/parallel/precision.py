"""Numeric formats of training: mixed precision, TF32, loss scaling."""

import functools

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from grpo.config import UserError
from grpo.config.types import KernelBackend, Precision
from grpo.kernels import use_triton

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # as torch.cpu.get_capabilities names them on x86 and ARM


def compute_dtype(mixed_precision: Precision) -> torch.dtype:
    """The dtype of parameters and activations in forward and backward; a KV cache must have it too."""
    if mixed_precision == "auto":
        mixed_precision = "bf16" if multiplies_bf16() else "fp32"
    return _DTYPES[mixed_precision]


def mixed_precision_policy(mixed_precision: Precision, grad_precision: Precision | None) -> MixedPrecisionPolicy:
    """What FSDP2 casts: parameters for forward and backward, gradients for their reduction over ranks.

    The parameters that the optimizer sees, and its state, stay fp32.
    """
    dtype = compute_dtype(mixed_precision)
    param_dtype = None if dtype == torch.float32 else dtype
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=_DTYPES[grad_precision or "fp32"])


def set_matmul_precision(mixed_precision: Precision) -> None:
    """Allow TF32 in matrix products and convolutions unless the run is to be exact fp32.

    It also speeds up what stays fp32 under bf16 and fp16: the frozen tokenizer and the rewards.
    """
    exact = mixed_precision != "tf32" and compute_dtype(mixed_precision) == torch.float32
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def grad_scaler(mixed_precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """Dynamic loss scaling, which fp16 gradients need (Micikevicius et al. 2018, arXiv:1710.03740); None otherwise.

    On sharded gradients it agrees over ranks on whether one overflowed.
    """
    return torch.amp.GradScaler(device.type) if mixed_precision == "fp16" else None


def require_backend(backend: KernelBackend, device: torch.device, *, key: str) -> None:
    """Raise a UserError if the kernels that a recipe's `key` insists on do not run on the device."""
    try:
        use_triton(backend, op="this machine", device=device, obstacle=None)
    except ValueError as error:
        raise UserError(f'{key} = "{backend}": {error}; set it to "auto"') from error


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this machine's device does. A CPU without such instructions takes several times as long as for fp32."""
    capabilities = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or any(capabilities.get(name) for name in _BF16_INSTRUCTIONS)
