"""True sampling: one token after the other with a static KV cache."""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from grpo.kernels import Draw
from grpo.models import CachedForward, Condition, Generator, as_condition, family_of
from grpo.parallel import free_memory, gathered
from grpo.position import counted
from grpo.rollout.cached_sampler import CachedSampler, SampledCodes, bytes_per_sequence

MEMORY_SHARE = 0.8  # of the free memory, for caches and logits
KEEP_MEMORY = 0.1  # of a GPU's memory, for what stays from one call to the next


class CodeSampler:
    """Draws completions of conditions, call after call.

    On a GPU a call captures its step as a CUDA graph. Cache, graph and a copy of the weights stay for the next call
    where together they take little memory; otherwise all of it is freed with the call, because the update needs it.

    Args:
        model: an image generator; under FSDP2 its parameters are gathered once for a whole call.
        draw: how a code is drawn from logits; its `impl` is that of the forward, too.
        cfg_scale: classifier-free guidance, 1 is off.
        cfg_interval: guidance is switched off after this position (LlamaGen's `cfg_interval`); -1 keeps it on.
        max_rows: completions sampled together; 0 is as many as fit into a GPU's memory, and all on a CPU.
        keep_memory: share of a GPU's memory that may stay in use between two calls. As much may go into a copy of the
            weights, which is faster to compute with.
    """

    def __init__(
        self,
        model: Generator,
        *,
        draw: Draw,
        cfg_scale: float = 1.0,
        cfg_interval: int = -1,
        max_rows: int = 0,
        keep_memory: float = KEEP_MEMORY,
    ) -> None:
        self.model, self.max_rows, self.keep_memory = model, max_rows, keep_memory
        self.draw, self.cfg_scale, self.cfg_interval = draw, cfg_scale, cfg_interval
        self._kept: CachedSampler | None = None
        self._addresses: list[int] = []  # of the weights that its graph reads

    @torch.no_grad()
    def __call__(self, condition: Condition, *, row_ids: Tensor) -> SampledCodes:
        """G completions of each of B rows of a condition, one row's after the other's.

        row_ids [B * G] int64 are global numbers of the completions; their random numbers depend on nothing else.
        """
        total, drawn = len(row_ids), []
        group = total // condition.rows
        assert group * condition.rows == total, "as many completions of each row"
        with gathered(self.model):
            engine = self._engine(total)
            rows, parts = engine.rows, math.ceil(total / engine.rows)
            row_ids = nn.functional.pad(row_ids, (0, rows * parts - total))  # with copies of the first completion's
            condition_rows = torch.arange(rows * parts, device=row_ids.device).clamp(max=total - 1) // group
            for start in counted(range(0, rows * parts, rows), "batch"):
                part = slice(start, start + rows)
                first, last = (min(place, total - 1) // group for place in (start, start + rows - 1))
                shared = condition.select(slice(first, last + 1))
                engine.start(shared, row_ids[part], condition_rows[part] - first)
                for _ in counted(range(engine.length - 1), "code"):
                    engine.extend()
                drawn.append(engine.read())
            held = engine.nbytes + bytes_of_copies(engine.forward)
            self._kept = engine if held <= self._memory_to_keep() else None
            self._addresses = addresses(engine.forward)
        return SampledCodes(*(torch.cat(values)[:total] for values in zip(*drawn, strict=True)))

    def _engine(self, total: int) -> CachedSampler:
        """The sampler of the last call, if it is of the right size and its graph is still true, or a new one."""
        kept, self._kept = self._kept, None
        wanted = parts_of(total, self.max_rows or total)[0]
        if kept is not None and wanted <= kept.rows < 2 * wanted and self._refreshed_in_place(kept.forward):
            return kept
        del kept
        fits = sum(parameter.nbytes for parameter in self.model.parameters()) <= self._memory_to_keep()
        forward = family_of(self.model).cached_forward(self.model, impl=self.draw.impl, copies=fits)
        most = self.max_rows or rows_in_memory(self.model, guided=self.cfg_scale != 1.0)
        rows, _ = parts_of(total, most)
        return CachedSampler(forward, rows, draw=self.draw, cfg_scale=self.cfg_scale, cfg_interval=self.cfg_interval)

    def _refreshed_in_place(self, forward: CachedForward) -> bool:
        """Takes up the model's weights; whether they are where the graph of the last call looks for them."""
        forward.refresh()
        return self._addresses == addresses(forward)

    def _memory_to_keep(self) -> int:
        """Bytes; none on a CPU, where building anew costs nothing."""
        device = self.model.output.weight.device
        if device.type != "cuda":
            return 0
        return int(self.keep_memory * torch.cuda.get_device_properties(device).total_memory)


def sample_codes(model: Generator, condition: Condition, *, row_ids: Tensor, **settings: Any) -> SampledCodes:
    """A single call of a `CodeSampler` with these settings."""
    return CodeSampler(model, **settings)(condition, row_ids=row_ids)


def addresses(forward: CachedForward) -> list[int]:
    """Where the weights are."""
    return [weight.data_ptr() for weight in forward.weights]


def bytes_of_copies(forward: CachedForward) -> int:
    """Memory of weights that are not the model's own."""
    own = {parameter.data_ptr() for parameter in forward.model.parameters()}
    return sum(weight.nbytes for weight in forward.weights if weight.data_ptr() not in own)


def parts_of(total: int, most: int) -> tuple[int, int]:
    """(rows of a part, number of parts): the fewest parts of at most `most` rows, of equal size to share buffers."""
    parts = max(1, math.ceil(total / most))
    return math.ceil(total / parts), parts


def rows_in_memory(model: Generator, *, guided: bool) -> int:
    """Completions whose caches fit beside what is in the memory of the model's GPU now."""
    weight = model.output.weight
    if weight.device.type != "cuda":
        return sys.maxsize
    row = bytes_per_sequence(model, dtype=weight.dtype, guided=guided)
    return max(1, int(free_memory(weight.device) * MEMORY_SHARE) // row)


def generate(
    model: Generator,
    condition: Condition | Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    row_ids: Tensor | None = None,
    **draw: Any,
) -> Tensor:
    """Codes [B, T] of one image for each row of a condition, or for each of the class ids [B].

    An image depends on its condition, the seed and its row id only (by default its place), not on what is generated
    with it.

    Args:
        cfg_scale, cfg_interval, row_ids: see `CodeSampler`.
        draw: `temperature`, `top_k`, `top_p`, `seed` and `impl`, see `Draw`.
    """
    condition = as_condition(condition)
    if row_ids is None:
        row_ids = torch.arange(condition.rows, device=condition.device)
    sampler = CodeSampler(model, draw=Draw(**draw), cfg_scale=cfg_scale, cfg_interval=cfg_interval)
    return sampler(condition, row_ids=row_ids).tokens
