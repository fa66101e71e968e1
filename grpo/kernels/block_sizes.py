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
BOUNDS = {"above", "up_to"}
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
    if op not in table["default"]:
        raise ValueError(f"the table of block sizes has no {op} under default")
    entries = [*table.get(device, {}).get(op, []), *table["default"][op]]
    entry = next(entry for entry in entries if entry.get("above", 0) < size <= entry.get("up_to", size))
    return {name: value for name, value in entry.items() if name not in BOUNDS}


def read_table(file: Path = FILE) -> Table:
    """The table in a file. Raises ValueError: there is none, or it has entries that no kernel can use."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        problem = _problem(table)
    except (OSError, ValueError, RecursionError) as error:  # undecodable text and broken JSON are ValueErrors
        problem = str(error)
    if problem:
        raise ValueError(f"{file} is no table of block sizes: {problem}")
    return table


def _problem(table: object) -> str | None:
    """What is wrong with a table. Ops that "default" does not have are another version's, and never looked up."""
    if (
        not isinstance(table, dict)
        or "default" not in table
        or not all(isinstance(ops, dict) for ops in table.values())
    ):
        return 'expected an object of ops for each device, "default" among them'
    default = table["default"]
    for device, op, entries in ((name, *item) for name in {"default": None, **table} for item in table[name].items()):
        where = f"{device}, {op}"
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            return f"{where} is not a list of entries"
        if op not in default:
            continue
        known = set().union(*default[op])
        for entry in entries:
            if entry.keys() - BOUNDS - known:
                return f"{where} has the unknown setting {min(entry.keys() - BOUNDS - known)}"
            if missing := known - BOUNDS - entry.keys():
                return f"{where} has an entry without {min(missing)}"
            for name, value in entry.items():
                if type(value) is not int or not _usable(name, value):
                    return f"{where} has {name} = {value!r}"
        if device == "default" and BOUNDS & entries[-1].keys():
            return f"{where}: the last entry must be for every size"
    return None


def _usable(name: str, value: int) -> bool:
    if name in BOUNDS or name == "library":
        return value >= 0
    if name.startswith("TILE") or name == "num_warps":
        return 1 <= value <= 1 << 16 and value.bit_count() == 1  # a tile is a power of two
    return 1 <= value <= 64


def device_name() -> str:
    """The current GPU's name, or "default" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "default"


_device_name = functools.cache(device_name)  # the GPUs of one process are taken to be alike
_packaged = functools.cache(read_table)


@functools.cache
def _of_device(op: str, size: int, device: str) -> dict[str, int]:
    return find(_packaged(), op, size, device)
