"""The process group of a run: started with torchrun or alone, on CPU (gloo) or CUDA (NCCL)."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.config import TransientError, UserError, reason, shorten
from grpo.parallel.rendezvous import choose_network_interface, connect_store

_store: dist.Store | None = None  # outlives the group, so that the launcher can still agree on who reports an error


@dataclass(frozen=True)
class World:
    """Where this process stands: rank 0 .. size - 1 over all hosts, local rank on this one, and what it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0


@contextmanager
def distributed(timeout_seconds: int) -> Iterator[World]:
    """Join the process group for the duration of the block; a process started alone is a group of one.

    On CUDA the group has both backends: NCCL for tensors on the GPU, gloo for those on the CPU. A collective that some
    rank does not join raises on the others after `timeout_seconds`.
    """
    global _store
    rank, size, local_rank, local_size = _launch_environment()
    timeout, device = timedelta(seconds=timeout_seconds), _bind_device(local_rank)
    if size > local_size:
        choose_network_interface()
    try:
        _store = connect_store(rank, size, timeout)
    except (RuntimeError, OSError, ValueError) as error:  # a DistError is a RuntimeError
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TransientError(
            f"rank {rank} has not met the other {size - 1} at {where} within parallel.timeout = {timeout_seconds} s "
            f"({reason(error)}): start all ranks with torchrun, and see that they reach that address"
        ) from error
    backend, bound = ("cuda:nccl,cpu:gloo", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout, device_id=bound)
    finished = False
    try:
        yield World(rank, size, local_rank, local_size, device)
        finished = True
    finally:
        # With an error on its way out, closing the connections would make other ranks fail before this one has told
        # why, and NCCL would wait for work in flight that never ends. The launcher ends the process instead.
        if finished or size == 1:
            dist.destroy_process_group()


def run_store() -> dist.Store | None:
    """The key-value store of this start of the run; None before the group is up."""
    return _store


def environment_rank() -> int:
    """The rank that torchrun gave to this process, 0 without torchrun; known before the group is up."""
    rank = os.environ.get("RANK", "")
    return int(rank) if re.fullmatch(r"[0-9]{1,9}", rank) else 0


def all_reduce_sums(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Totals over all ranks of 0-dim tensors or numbers, named alike on each, in fp64, in one transfer."""
    if not values:
        return {}
    names, fastest = sorted(values), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = next((value.device for value in values.values() if isinstance(value, Tensor)), fastest)
    totals = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=device) for name in names])
    if dist.is_initialized():
        totals = totals.to(fastest)  # where the group's fastest backend takes it
        dist.all_reduce(totals)
    return dict(zip(names, totals.tolist(), strict=True))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """The largest `value` of all ranks. Goes over the CPU's backend, so that no GPU is waited for."""
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def gather_numbers(values: Sequence[float]) -> Tensor:
    """The numbers of every rank, [ranks, len(values)] fp64. Goes over the CPU's backend: no GPU is waited for."""
    own = torch.tensor(values, dtype=torch.float64)
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, own)
    return torch.stack(everyones)


def next_row(rows: Tensor) -> Tensor:
    """Of each row of `rows` [B, ...] the next one, in a circle through the rows of all ranks, rank after rank."""
    first = rows[:1].contiguous()
    if dist.is_initialized():
        firsts = [torch.empty_like(first) for _ in range(dist.get_world_size())]
        dist.all_gather(firsts, first)
        first = firsts[(dist.get_rank() + 1) % len(firsts)]
    return torch.cat([rows[1:], first])


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The picklable `value` of rank `source`, on every rank; the argument of the other ranks is ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The picklable `value` of every rank of the group (None: of all), in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def launched_world() -> World:
    """Where this process stands, without joining the others. Raises a UserError for a broken environment."""
    return World(*_launch_environment(), device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _launch_environment() -> tuple[int, int, int, int]:
    """Rank, ranks, rank on this host, ranks on this host, as the launcher says; a process alone without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0, 1
    told = {name: os.environ.get(name, "") for name in (*names, "MASTER_ADDR")}
    if missing := [name for name, value in told.items() if not value]:
        raise UserError(
            f"the environment has RANK or WORLD_SIZE but no {missing[0]}: start with torchrun, or unset both"
        )
    if wrong := [name for name in names if not re.fullmatch(r"-?[0-9]{1,18}", told[name])]:
        raise UserError(
            f"the environment has {wrong[0]} = {shorten(told[wrong[0]])!r}, no whole number: start with torchrun"
        )
    rank, size, local_rank, local_size, port = (int(told[name]) for name in names)
    ranges = {"RANK": (rank, 0, size), "WORLD_SIZE": (size, 1, 2**20), "MASTER_PORT": (port, 0, 2**16),
              "LOCAL_WORLD_SIZE": (local_size, 1, size + 1), "LOCAL_RANK": (local_rank, 0, local_size)}  # fmt: skip
    for name in ("WORLD_SIZE", *ranges):
        value, low, end = ranges[name]
        if not low <= value < end:
            raise UserError(f"the environment has {name} = {value}, not in {low}..{end - 1}: start with torchrun")
    return rank, size, local_rank, local_size


def _bind_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(f"This host has {count} GPU(s) but more processes: use torchrun --nproc_per_node={count}.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
