"""Compiled blocks for decoding on a CPU, where a run is long enough to earn the compilation back."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

STEPS_THAT_PAY = 20_000
"""Decode steps of a run; measured in docs/performance.md."""

COMPILERS = ("g++", "clang++")  # one of which torch.compile needs on a CPU


def compilation_pays(device: torch.device, decode_steps: int) -> bool:
    """Whether to compile: on a CPU with a C++ compiler, for many steps. A GPU replays its steps as CUDA graphs."""
    return device.type == "cpu" and decode_steps >= STEPS_THAT_PAY and any(map(shutil.which, COMPILERS))


class CompiledBlocks:
    """The compiled blocks of a model, used inside `with blocks():` only: training keeps its own.

    Alike blocks are compiled once, at their first call; where `compile.enabled` has compiled them, that is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = [block for block in model.layers if block._compiled_call_impl is None]
        self._calls = [torch.compile(block._call_impl) for block in self._blocks]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        for block, call in zip(self._blocks, self._calls, strict=True):
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block in self._blocks:
                block._compiled_call_impl = None
