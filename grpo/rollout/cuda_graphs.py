"""Functions on fixed buffers, replayed as CUDA graphs."""

import functools
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


class Replay:
    """Calls of one function without arguments: the first runs it, the second captures it as a CUDA graph.

    The first call compiles kernels and sets up libraries, which is not allowed during a capture. Where the capture
    fails the function is run as it is, with one line in the log. The function works on fixed buffers and does not wait
    for the device; it comes with every call, so that no circle of references keeps its buffers.
    """

    def __init__(self) -> None:
        self.graph: Callable[[], None] | None = None
        self.calls = 0

    def __call__(self, function: Callable[[], None]) -> None:
        self.calls += 1
        if self.calls == 2:
            try:
                self.graph = capture(function)
            except RuntimeError as error:
                # Ending the capture fails too and says less. No name may keep the cause: it would keep the cache.
                _log_fallback(str(error.__context__ or error).partition("\n")[0])
        (self.graph or function)()


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that `function` launches, without running them; the result launches them all at once."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads (pinning of batches, NCCL's watchdog, checkpoints) may go on with calls that a capture forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream as the current one
    return graph.replay


@functools.cache
def _log_fallback(reason: str) -> None:
    logger.warning("sampling runs without a CUDA graph: %s", reason)
