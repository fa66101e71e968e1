"""The engine of true sampling: sequences in a cache that grow by one code a call, on buffers that never move."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo.kernels import Draw, project_logits
from grpo.models import Condition
from grpo.rollout.scoring import guide


class SampledCodes(NamedTuple):
    """Sampled images as codes."""

    tokens: Tensor  # [N, T] int64
    log_probs: Tensor  # [N, T] fp32, of the full tempered (and guided) distribution
    kept_mass: Tensor  # [N, T] fp32, probability of the set that top-k and top-p left to draw from


class CachedSampler:
    """N sequences that grow by one code with each call of `extend`.

    A call reads and writes the same memory every time: the row that it computes, like everything else that changes, is
    a tensor on the device. Nothing waits for the host, so a GPU can replay it as a CUDA graph.

    Args:
        model: an image generator whose parameters stay where they are for the life of the sampler.
        rows: N.
        draw, cfg_scale, cfg_interval: see `sample_codes`.
    """

    def __init__(self, model: nn.Module, rows: int, *, draw: Draw, cfg_scale: float, cfg_interval: int) -> None:
        self.model, self.draw, self.cfg_scale, self.cfg_interval = model, draw, cfg_scale, cfg_interval
        weight, self.length = model.output.weight, model.config.block_size
        self.copies = 1 if cfg_scale == 1.0 else 2
        self.cache = model.init_cache(rows * self.copies, dtype=weight.dtype, device=weight.device)
        self.row = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.row_ids = self.row.new_zeros(rows)
        self.previous = self.row.new_zeros(rows)
        empty = torch.zeros(self.length, rows, device=weight.device)
        self.drawn = SampledCodes(empty.long(), empty, empty.clone())  # each [T, N], one row a call

    def start(self, condition: Condition, row_ids: Tensor) -> None:
        """Begin new sequences, N rows of a condition and row_ids [N] int64, and draw their first code."""
        self.row.zero_()
        self.row_ids.copy_(row_ids)
        rows = condition.with_unconditional() if self.copies == 2 else condition
        self._emit(self.model.prefill(rows, self._cache(1)))

    def extend(self, length: int) -> None:
        """Draw the next code of each sequence; only the cache's first `length` rows, which hold it, are read."""
        self._emit(self.model.extend(self.previous.repeat(self.copies), self.row[0], self._cache(length)))

    def read(self) -> SampledCodes:
        """What has been drawn, in memory of its own."""
        return SampledCodes(*(values.t().clone() for values in self.drawn))

    def _cache(self, length: int) -> tuple[Tensor, ...]:
        return type(self.cache)(*(tensor[:, :, :, :length] for tensor in self.cache))

    def _emit(self, hidden: Tensor) -> None:
        """Draw from hidden states [N or 2N, D] and note the draw."""
        if self.copies == 2:
            guided, conditional = guide(hidden, self.cfg_scale), hidden[: len(self.row_ids)]
            always = self.cfg_interval < 0
            hidden = guided if always else torch.where(self.row - 1 <= self.cfg_interval, guided, conditional)
        logits = project_logits(hidden, self.model.output.weight)
        sample = self.draw.sample(logits, row_ids=self.row_ids * self.length + self.row)
        self.previous.copy_(sample.tokens[:, 0])
        for drawn, values in zip(self.drawn, (sample.tokens, sample.log_probs, sample.kept_mass), strict=True):
            drawn.index_copy_(0, self.row, values.view(1, -1))
        self.row.add_(1)


def bytes_per_sequence(model: nn.Module, *, dtype: torch.dtype, guided: bool) -> int:
    """Memory of one sequence: its cache, and twice its logits in fp32. The model may be on the meta device."""
    cache = sum(tensor.nbytes for tensor in model.init_cache(1, dtype=dtype, device="meta"))
    return cache * (2 if guided else 1) + 2 * 4 * model.config.vocab_size
