"""Block sizes of the Triton kernels: one table, by device, op and size, in `block_sizes.json`.

    {DEVICE NAME or "default": {OP: [{"above": A, "up_to": B, SETTING: NUMBER, ...}, ...]}}

The first entry with A < size <= B counts; a missing bound is none. The size of an op is V, of the projection D, of the
loss its tokens, of attention the head size, of products of few rows the features that a sum goes over. What the table
does not have for a device comes from "default". `python -m grpo.kernels.tune` measures candidates on the GPU at hand
and adds them under its name.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

FILE = Path(__file__).with_name("block_sizes.json")
Table = dict[str, dict[str, list[dict[str, int]]]]

_tried: dict[str, dict[str, int]] = {}


def block_sizes(op: str, size: int) -> Mapping[str, int]:
    """Settings of an op at a size, for the current GPU; those of "default" without one."""
    return _tried.get(op) or _of_device(op, size, _device_name())


@contextmanager
def trying(op: str, settings: Mapping[str, int]) -> Iterator[None]:
    """Other settings of an op for a while, whatever the table says."""
    _tried[op] = dict(settings)
    try:
        yield
    finally:
        del _tried[op]


def find(table: Table, op: str, size: int, device: str) -> dict[str, int]:
    """The settings that a table has."""
    entries = [*table.get(device, {}).get(op, []), *table["default"][op]]
    entry = next(entry for entry in entries if entry.get("above", 0) < size <= entry.get("up_to", size))
    return {name: value for name, value in entry.items() if name not in ("above", "up_to")}


def read_table(file: Path = FILE) -> Table:
    """The table in a file."""
    return json.loads(file.read_text())


def device_name() -> str:
    """The current GPU's name, or "default" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "default"


_device_name = functools.cache(device_name)  # the GPUs of one process are taken to be alike
_packaged = functools.cache(read_table)


@functools.cache
def _of_device(op: str, size: int, device: str) -> dict[str, int]:
    return find(_packaged(), op, size, device)
