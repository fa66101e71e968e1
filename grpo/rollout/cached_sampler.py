"""The engine of true sampling: sequences in a cache that grow by one code a call, on buffers that never move."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo.kernels import Draw, project_logits
from grpo.models import CachedForward, Condition, Generator, KVCache
from grpo.rollout.cuda_graphs import Replay
from grpo.rollout.scoring import guide

PREFILL_ROWS = 1 << 14  # of conditions that are computed together: enough for any GPU, and little of its memory


class SampledCodes(NamedTuple):
    """Sampled images as codes."""

    tokens: Tensor  # [N, T] int64
    log_probs: Tensor  # [N, T] fp32, of the full tempered (and guided) distribution
    kept_mass: Tensor  # [N, T] fp32, probability of the set that top-k and top-p left to draw from


class CachedSampler:
    """N sequences that grow by one code with each call of `extend`.

    A call reads and writes the same memory every time: the row that it computes, like everything else that changes, is
    a tensor on the device. Nothing waits for the host, so that a GPU replays the call as a CUDA graph.

    Args:
        forward: computes the rows; see `refresh` there for how long the sampler may be used.
        rows: N.
        draw, cfg_scale, cfg_interval: see `CodeSampler`.
    """

    def __init__(self, forward: CachedForward, rows: int, *, draw: Draw, cfg_scale: float, cfg_interval: int) -> None:
        self.forward, self.rows, self.draw = forward, rows, draw
        self.cfg_scale, self.cfg_interval = cfg_scale, cfg_interval
        weight, self.length = forward.projection, forward.model.config.block_size
        self.copies = 1 if cfg_scale == 1.0 else 2
        self.cache = forward.model.init_cache(rows * self.copies, dtype=weight.dtype, device=weight.device)
        self.row = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.row_ids = self.row.new_zeros(rows)
        self.previous = self.row.new_zeros(rows)
        empty = torch.zeros(self.length, rows, device=weight.device)
        self.drawn = SampledCodes(empty.long(), empty, empty.clone())  # each [T, N], one row a call
        self.replay = Replay() if weight.is_cuda else None
        self.position = 0  # of the next code, as `row` says it on the device

    @property
    def nbytes(self) -> int:
        """Memory of cache and buffers, without the temporary memory of a graph."""
        return sum(tensor.nbytes for tensor in (*self.cache, *self.drawn))

    def start(self, condition: Condition, row_ids: Tensor, index: Tensor | None = None) -> None:
        """Begin new sequences and draw their first code.

        Args:
            condition: its rows, and their unconditional ones, are computed once for all sequences that share them.
            row_ids: [N] int64.
            index: [N] int64, the row of the condition that each sequence has; None is N rows, each sequence its own.
        """
        index = torch.arange(len(row_ids), device=row_ids.device) if index is None else index
        self.row.zero_()
        self.row_ids.copy_(row_ids)
        if self.copies == 2:
            index = torch.cat([index, index + condition.rows])
            condition = condition.with_unconditional()
        model, keys = self.forward.model, self.cache.keys
        prefixes = model.init_cache(condition.rows, dtype=keys.dtype, device=keys.device, length=model.prefix_length)
        hidden, most = [], max(1, PREFILL_ROWS // condition.length)
        for start in range(0, condition.rows, most):
            part = slice(start, start + most)
            hidden.append(self.forward.prefill(condition.select(part), prefixes.sequences(part)))
        self.cache.begin_with(prefixes, index)
        self._emit(torch.cat(hidden)[index])
        self.position = 1

    def extend(self) -> None:
        """Draw the next code of each sequence."""
        if self.replay is None:
            self.step()
        else:
            self.replay(self.step)
        self.position += 1

    def step(self) -> None:
        """What `extend` does on the device."""
        tokens = self.previous.repeat(self.copies)
        self._emit(self.forward.extend(tokens, self.row[0], self._filled_cache()))

    def read(self) -> SampledCodes:
        """What has been drawn, in memory of its own."""
        return SampledCodes(*(values.t().clone() for values in self.drawn))

    def _filled_cache(self) -> KVCache:
        """All of it where the work of a call may not change, or the rows up to the present one, the last but T - p."""
        if self.forward.reads_filled_part or self.replay is not None:
            return self.cache
        return self.cache.upto(self.cache.keys.shape[3] - self.length + self.position + 1)

    def _emit(self, hidden: Tensor) -> None:
        """Draw from hidden states [N or 2N, D] and note the draw."""
        if self.copies == 2:
            guided, conditional = guide(hidden, self.cfg_scale), hidden[: len(self.row_ids)]
            always = self.cfg_interval < 0
            hidden = guided if always else torch.where(self.row - 1 <= self.cfg_interval, guided, conditional)
        logits = project_logits(hidden, self.forward.projection)
        sample = self.draw.sample(logits, row_ids=self.row_ids * self.length + self.row)
        self.previous.copy_(sample.tokens[:, 0])
        for drawn, values in zip(self.drawn, (sample.tokens, sample.log_probs, sample.kept_mass), strict=True):
            drawn.index_copy_(0, self.row, values.view(1, -1))
        self.row.add_(1)


def bytes_per_sequence(model: Generator, *, dtype: torch.dtype, guided: bool) -> int:
    """Memory of one sequence: its cache, and twice its logits in fp32. The model may be on the meta device."""
    cache = sum(tensor.nbytes for tensor in model.init_cache(1, dtype=dtype, device="meta"))
    return cache * (2 if guided else 1) + 2 * 4 * model.config.vocab_size
