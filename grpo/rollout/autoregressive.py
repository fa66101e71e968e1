"""True sampling: one token after the other with a static KV cache."""

import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from grpo.kernels import Draw
from grpo.models import Condition, as_condition
from grpo.parallel import free_memory, gathered
from grpo.rollout.cached_sampler import CachedSampler, SampledCodes, bytes_per_sequence
from grpo.rollout.cuda_graphs import Replay

SEGMENT = 128  # calls that read the same part of the cache; each segment costs a GPU one capture
MEMORY_SHARE = 0.8  # of the free memory, for caches and logits


@torch.no_grad()
def sample_codes(
    model: nn.Module,
    condition: Condition,
    *,
    row_ids: Tensor,
    draw: Draw,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    max_rows: int = 0,
) -> SampledCodes:
    """Draw one completion of each row of a condition.

    Cache, buffers and graphs live during this call only, and so do the parameters that FSDP2 gathers, at addresses of
    their own each time. Capturing anew costs about one call in `SEGMENT`.

    Args:
        model: an image generator; under FSDP2 its parameters are gathered once for the whole call.
        condition: N rows.
        row_ids: [N] int64, global numbers of the completions; their random numbers depend on nothing else.
        draw: how a code is drawn from logits.
        cfg_scale: classifier-free guidance, 1 is off.
        cfg_interval: guidance is switched off after this position (LlamaGen's `cfg_interval`); -1 keeps it on.
        max_rows: completions sampled together; 0 is as many as fit into a GPU's memory, and all on a CPU.
    """
    total, drawn = condition.rows, []
    with gathered(model):
        rows, parts = _parts(total, max_rows or rows_in_memory(model, guided=cfg_scale != 1.0))
        condition, row_ids = condition.padded(rows * parts), nn.functional.pad(row_ids, (0, rows * parts - total))
        sampler = CachedSampler(model, rows, draw=draw, cfg_scale=cfg_scale, cfg_interval=cfg_interval)
        calls = _calls(sampler)
        for start in range(0, rows * parts, rows):
            part = slice(start, start + rows)
            sampler.start(condition.select(part), row_ids[part])
            for position in range(1, sampler.length):
                calls[position // SEGMENT]()
            drawn.append(sampler.read())
    return SampledCodes(*(torch.cat(values)[:total] for values in zip(*drawn, strict=True)))


def _parts(total: int, most: int) -> tuple[int, int]:
    """(rows of a part, number of parts): the fewest parts of at most `most` rows, of equal size to share buffers."""
    parts = max(1, math.ceil(total / most))
    return math.ceil(total / parts), parts


def rows_in_memory(model: nn.Module, *, guided: bool) -> int:
    """Completions whose caches fit beside what is in the memory of the model's GPU now."""
    weight = model.output.weight
    if weight.device.type != "cuda":
        return sys.maxsize
    row = bytes_per_sequence(model, dtype=weight.dtype, guided=guided)
    return max(1, int(free_memory(weight.device) * MEMORY_SHARE) // row)


def _calls(sampler: CachedSampler) -> list[Callable[[], None]]:
    """The calls of `extend` of each segment; on a GPU they are replayed as CUDA graphs."""
    length = sampler.length
    calls = [partial(sampler.extend, min(first + SEGMENT, length)) for first in range(0, length, SEGMENT)]
    if not sampler.row.is_cuda:
        return calls
    pool = torch.cuda.graph_pool_handle()
    return [Replay(call, pool) for call in calls]


def generate(
    model: nn.Module,
    condition: Condition | Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    row_ids: Tensor | None = None,
    **draw: float | int | str,
) -> Tensor:
    """Codes [B, T] of one image for each row of a condition, or for each of the class ids [B].

    An image depends on its condition, the seed and its row id only (by default its place), not on what is generated
    with it.

    Args:
        cfg_scale, cfg_interval, row_ids: see `sample_codes`.
        draw: `temperature`, `top_k`, `top_p`, `seed` and `impl`, see `Draw`.
    """
    condition = as_condition(condition)
    if row_ids is None:
        row_ids = torch.arange(condition.rows, device=condition.device)
    guidance = {"cfg_scale": cfg_scale, "cfg_interval": cfg_interval}
    return sample_codes(model, condition, row_ids=row_ids, draw=Draw(**draw), **guidance).tokens
