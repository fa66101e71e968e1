"""The engine of true sampling: a decode step on buffers that never move, which a GPU replays as a CUDA graph."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo.kernels import Sample, project_logits
from grpo.models import GPTConfig, KVCache
from grpo.rollout.scoring import guide

logger = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """Sampled images as codes."""

    tokens: Tensor
    """[N, T] int64."""
    log_probs: Tensor
    """[N, T] fp32, of the full tempered (and guided) distribution."""
    kept_mass: Tensor
    """[N, T] fp32, probability of the set that top-k and top-p left to draw from."""


class Decoder:
    """N sequences that grow by one code a step.

    A step reads and writes the same memory every time: the row that it computes, like everything else that changes, is
    a tensor on the device. Nothing waits for the host.

    Args:
        model: a GPT whose parameters stay where they are for the life of the decoder.
        rows: N.
        draw: logits [N, V] and row_ids [N] -> Sample, one draw of each row.
        cfg_scale, cfg_interval: see `decode`.
    """

    def __init__(
        self, model: nn.Module, rows: int, *, draw: Callable[..., Sample], cfg_scale: float, cfg_interval: int
    ) -> None:
        self.model, self.draw = model, draw
        self.cfg_scale, self.cfg_interval = cfg_scale, cfg_interval
        weight, self.length = model.output.weight, model.config.block_size
        self.copies = 1 if cfg_scale == 1.0 else 2
        self.cache = model.init_cache(rows * self.copies, dtype=weight.dtype, device=weight.device)
        self.row = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.row_ids = self.row.new_zeros(rows)
        self.previous = self.row.new_zeros(rows)
        empty = torch.zeros(self.length, rows, device=weight.device)
        self.drawn = Decoded(empty.long(), empty, empty.clone())  # each [T, N], one row a step

    def start(self, class_ids: Tensor, row_ids: Tensor) -> None:
        """Begin new sequences, class_ids [N] and row_ids [N] both int64, and draw their first code."""
        self.row.zero_()
        self.row_ids.copy_(row_ids)
        conditions = class_ids
        if self.copies == 2:
            conditions = torch.cat([class_ids, torch.full_like(class_ids, self.model.config.num_classes)])
        self._emit(self.model.prefill(conditions, self._cache(1)))

    def step(self, length: int) -> None:
        """Draw the next code of each sequence; only the cache's first `length` rows, which hold it, are read."""
        self._emit(self.model.decode(self.previous.repeat(self.copies), self.row[0], self._cache(length)))

    def read(self) -> Decoded:
        """What has been drawn, in memory of its own."""
        return Decoded(*(values.t().clone() for values in self.drawn))

    def _cache(self, length: int) -> KVCache:
        return KVCache(*(tensor[:, :, :, :length] for tensor in self.cache))

    def _emit(self, hidden: Tensor) -> None:
        """Draw from hidden states [N or 2N, D] and note the draw."""
        if self.copies == 2:
            guided, conditional = guide(hidden, self.cfg_scale), hidden[: len(self.row_ids)]
            always = self.cfg_interval < 0
            hidden = guided if always else torch.where(self.row - 1 <= self.cfg_interval, guided, conditional)
        logits = project_logits(hidden, self.model.output.weight)
        sample = self.draw(logits, row_ids=self.row_ids * self.length + self.row)
        self.previous.copy_(sample.tokens[:, 0])
        for drawn, values in zip(self.drawn, (sample.tokens, sample.log_probs, sample.kept_mass), strict=True):
            drawn.index_copy_(0, self.row, values.view(1, -1))
        self.row.add_(1)


class Replay:
    """A function without arguments, on fixed buffers: the first call runs it, the second captures it as a CUDA graph.

    The first call compiles kernels and sets up libraries, which is not allowed during a capture. Where the capture
    fails the function is run as it is, with one line in the log.

    Args:
        function: what to run; it must not wait for the device.
        pool: of the graphs' temporary memory, shared by graphs that never run at the same time.
    """

    def __init__(self, function: Callable[[], None], pool: tuple[int, int]) -> None:
        self.function, self.pool = function, pool
        self.warm = False
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if not self.warm:
            self.warm = True
            self.function()
            return
        if self.replay is None:
            try:
                self.replay = capture(self.function, self.pool)
            except RuntimeError as error:
                # Ending the capture fails too and says less. No name may keep the cause: it would keep the cache.
                _log_fallback(str(error.__context__ or error).partition("\n")[0])
                self.replay = self.function
        self.replay()


def capture(function: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """Record the kernels that `function` launches, without running them; the result launches them all at once."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (pinning of batches, NCCL's watchdog, checkpoints) may go on with calls that a capture forbids.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


def bytes_per_row(config: GPTConfig, *, dtype: torch.dtype, copies: int) -> int:
    """Memory of one sequence: its cache, and twice its logits in fp32.

    Args:
        copies: 2 with guidance, 1 without.
    """
    cache = 2 * config.n_layer * config.kv_heads * config.block_size * config.head_dim * dtype.itemsize
    return copies * cache + 2 * 4 * config.vocab_size


@functools.cache
def _log_fallback(reason: str) -> None:
    logger.warning("decode steps run without a CUDA graph: %s", reason)
