"""Which implementation of an op runs: its Triton kernels or its torch reference; what all ops check and sum in."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

_warn_once = functools.cache(logging.getLogger(__name__).warning)

IMPLEMENTATIONS = ("auto", "triton", "reference")


def use_triton(impl: str, *, op: str, device: torch.device, obstacle: str | None) -> bool:
    """Whether the kernels of `op` run on this call.

    `obstacle` says why the kernels cannot take the inputs, or is None. "auto" falls back to the reference, on a GPU
    with one log line for each reason; "triton" raises ValueError instead, as does an unknown `impl`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return False
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = f"the tensors are on {device.type}, not on a GPU"
    elif importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    if impl == "triton":
        if obstacle:
            raise ValueError(f"{op} cannot run its Triton kernels: {obstacle}")
        return True
    if device.type != "cuda":
        return False
    if obstacle:
        _warn_once("%s uses the torch reference: %s", op, obstacle)
    return obstacle is None


def has_ex2() -> bool:
    """Whether kernels may use the instruction ex2 of NVIDIA's GPUs; the interpreter and other GPUs have none."""
    return torch.cuda.is_available() and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


def row_obstacle(**matrices: Tensor) -> str | None:
    """Why a kernel cannot read rows of these matrices, by their names; None if it can."""
    for name, matrix in matrices.items():
        if matrix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{name} is {matrix.dtype}"
        if matrix.stride(1) != 1:
            return f"the elements of a row of {name} are not adjacent"
    return None


def check_temperature(temperature: float) -> None:
    """Refuses what is not positive, and what logits could not be divided or multiplied by in fp32."""
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature is {temperature}; it must be positive, and between 1e-30 and 1e30")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where an input already is: the reference then serves as the truth of the tests."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(device: torch.device, count: int) -> Tensor:
    """Counters of arrived programs, 0 before a launch and after it. Launches on one device follow one another.

    They stay for good, because a CUDA graph may hold them. None is made in a capture: the call before it, which
    compiles the kernel, has made it.
    """
    key = device, max(1 << 16, 1 << (count - 1).bit_length())
    if key not in _counters:
        _counters[key] = torch.zeros(key[1], dtype=torch.int32, device=device)
    return _counters[key]
