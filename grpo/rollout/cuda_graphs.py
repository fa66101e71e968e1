"""Functions on fixed buffers, replayed as CUDA graphs."""

import functools
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


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
        self.run, self.calls = function, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            try:
                self.run = capture(self.function, self.pool)
            except RuntimeError as error:
                # Ending the capture fails too and says less. No name may keep the cause: it would keep the cache.
                _log_fallback(str(error.__context__ or error).partition("\n")[0])
        self.run()


def capture(function: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """Record the kernels that `function` launches, without running them; the result launches them all at once."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (pinning of batches, NCCL's watchdog, checkpoints) may go on with calls that a capture forbids.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


@functools.cache
def _log_fallback(reason: str) -> None:
    logger.warning("sampling runs without a CUDA graph: %s", reason)
