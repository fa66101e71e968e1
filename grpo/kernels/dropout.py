"""Dropout whose masks are functions of row numbers: the same in every forward, on any ranks, in any micro-batch.

Packing (`philox.py`): the key is the seed, the counter's words are

    c0 = position * ceil(D / 4) + group      c1 = stream | place << 8 | layer << 16      c2, c3 = row id, low word first

Within a position of D features with q = ceil(D / 4) groups, feature i is word i // q of group i % q, as in a draw's
list. A feature is kept if the upper 24 bits of its word, as a fraction of 2^24, are not below the rate.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, use_triton
from grpo.kernels.philox import RandomStream, philox_stack, split_words
from grpo.kernels.uniform import philox_uniform


@dataclass(frozen=True)
class Dropout:
    """The random numbers of the dropouts of one forward over R rows; a model is handed it whole.

    A mask depends on the seed, the row's id, the layer, the place in it and the element, and on nothing else: forwards
    of a row drop the same, whatever is computed beside it.
    """

    row_ids: Tensor  # [R] int64: numbers that no other row of the run has, however often a row is computed
    seed: int = 0
    impl: str = "auto"
    layer: Tensor | None = None  # [] int64; None stands for layer 0, which is what comes before the blocks

    def layers(self, count: int) -> list["Dropout"]:
        """Those of `count` blocks, numbered from 1."""
        numbers = torch.arange(1, count + 1, device=self.row_ids.device)  # tensors, so that blocks compile once
        return [replace(self, layer=number) for number in numbers.unbind()]

    def repeat(self, count: int) -> "Dropout":
        """For `count` copies of the rows, one after the other, which drop the same."""
        return replace(self, row_ids=self.row_ids.repeat(count))

    def __call__(self, x: Tensor, rate: float, *, place: int = 0) -> Tensor:
        """x [R, S, D] with a share `rate` of its features 0 and the others divided by 1 - rate; as it is at rate 0."""
        if not rate:
            return x
        return drop_features(
            x, rate, row_ids=self.row_ids, seed=self.seed, layer=self.layer, place=place, impl=self.impl
        )

    def rows(self, rate: float, *, place: int) -> Tensor:
        """[R] bool: rows that are dropped whole."""
        stream = RandomStream.DROPOUT | place << 8
        return philox_uniform(self.row_ids, 1, seed=self.seed, step=stream, impl=self.impl)[:, 0] < rate


def drop_features(
    x: Tensor, rate: float, *, row_ids: Tensor, seed: int, layer: Tensor | None = None, place: int = 0,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Srivastava et al. 2014 with the masks of this file: x [R, S, D] with kept features divided by 1 - rate.

    The scale is applied in fp32 (fp64 for fp64) and rounded to the dtype of x. The gradient has the same mask, which is
    computed again and not kept. At rate 1 everything is 0.

    Args:
        row_ids: [R] int64.
        layer: [] int64 on the device, below 2^16; None is 0.
        place: 0 .. 255, tells dropouts of one layer apart.

    Raises ValueError for shapes or values out of range.
    """
    if x.ndim != 3 or row_ids.shape != x.shape[:1] or row_ids.dtype != torch.int64:
        found = f"{list(x.shape)} and {list(row_ids.shape)} {row_ids.dtype}"
        raise ValueError(f"expected x [R, S, D] and row_ids [R] int64, not {found}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}; it must lie in 0 .. 1")
    if not 0 <= place < 1 << 8:
        raise ValueError(f"place is {place}; it must lie in 0 .. 255")
    layer = torch.zeros((), dtype=torch.int64, device=x.device) if layer is None else layer
    return torch.ops.grpo.dropout(x, row_ids, layer, seed, place, rate, impl)


@torch.library.custom_op("grpo::dropout", mutates_args=())
def _dropout(x: Tensor, row_ids: Tensor, layer: Tensor, seed: int, place: int, rate: float, impl: str) -> Tensor:
    stream = RandomStream.DROPOUT | place << 8
    arguments = (x, row_ids, layer, seed, stream, *threshold_and_scale(rate))
    if use_triton(impl, op="dropout", device=x.device, obstacle=_obstacle(x)):
        from grpo.kernels.triton_dropout import launch

        with torch.cuda.device_of(x):
            return launch(*arguments)
    return _reference(*arguments)


_dropout.register_fake(lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))


def _setup_context(ctx, inputs, output):
    _, *ctx.arguments = inputs


def _autograd(ctx, grad):
    return torch.ops.grpo.dropout(grad, *ctx.arguments), *[None] * 6


_dropout.register_autograd(_autograd, setup_context=_setup_context)


def threshold_and_scale(rate: float) -> tuple[int, float]:
    """The upper 24 bits of a word from which on a feature is kept, and what it is then multiplied by."""
    return math.ceil(rate * 2**24), 1 / (1 - rate) if rate < 1 else 0.0


def _reference(
    x: Tensor, row_ids: Tensor, layer: Tensor, seed: int, stream: int, threshold: int, scale: float
) -> Tensor:
    _, S, D = x.shape
    groups = -(-D // 4)
    position, group = torch.arange(S, device=x.device)[:, None], torch.arange(groups, device=x.device)
    counter = position * groups + group, (layer << 16 | stream).view(1, 1, 1)
    words = philox_stack((*counter, *split_words(row_ids[:, None, None])), seed, dim=2)
    kept = words.flatten(2)[..., :D] >> 8 >= threshold  # [R, S, 4 * groups] before it is cut
    return torch.where(kept, x.to(accumulation_dtype(x)) * scale, 0).to(x.dtype)


def _obstacle(x: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}"
    return "2^33 elements or more" if x.numel() >= 1 << 33 else None
