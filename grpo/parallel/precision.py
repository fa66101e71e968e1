"""Numeric formats of training: mixed precision, TF32, loss scaling."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

MixedPrecision = Literal["fp32", "tf32", "bf16", "fp16"]
GradPrecision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(mixed_precision: MixedPrecision) -> torch.dtype:
    """The dtype of parameters and activations in forward and backward; a KV cache must have it too."""
    return _DTYPES[mixed_precision]


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
    torch.set_float32_matmul_precision("highest" if mixed_precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = mixed_precision != "fp32"


class LossScaler:
    """Dynamic loss scaling for fp16 gradients (Micikevicius et al. 2018, Mixed Precision Training, section 3.2).

    The loss is multiplied by a scale that keeps small gradients above fp16's underflow; a step whose gradient
    overflowed is skipped and halves the scale, `growth_interval` good steps in a row double it. Whether it overflowed
    is read from the global gradient norm, which is the same on every rank, so that scaling needs no collective of its
    own and works on sharded gradients and on any device. Switched off it scales by 1.

    Use: `scaler.scale(loss).backward()`, `scaler.unscale(parameters)`, clip, then `scaler.update(isfinite(norm))`.
    """

    def __init__(self, *, enabled: bool, initial_scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.factor = initial_scale if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.factor if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        if not self.enabled:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        torch._foreach_mul_(local, 1.0 / self.factor)

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step.

        Args:
            finite: whether the gradient norm was finite, hence the step taken.
        """
        if not self.enabled:
            return
        if not finite:
            self.factor = max(self.factor / 2, 1.0)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.factor *= 2
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a continued run needs; plain numbers."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        self.factor = float(state["factor"])
        self.good_steps = int(state["good_steps"])
