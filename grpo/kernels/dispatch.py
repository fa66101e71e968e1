"""Which implementation of an op runs: its Triton kernels or its torch reference; what all ops check and sum in."""

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger(__name__)

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
        _log_fallback(op, obstacle)
    return obstacle is None


@functools.cache
def _log_fallback(op: str, obstacle: str) -> None:
    logger.warning("%s uses the torch reference: %s", op, obstacle)


def check_temperature(temperature: float) -> None:
    """Refuses what is not positive, and what logits could not be divided or multiplied by in fp32."""
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature is {temperature}; it must be positive, and between 1e-30 and 1e30")


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where an input already is: the reference then serves as the truth of the tests."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
