"""An endless, shuffled, resumable stream of batches that does not depend on the number of ranks or workers.

Samples are numbered 0, 1, 2, ... over the whole run. The number alone decides the image: epoch = number // N, and the
place in a permutation drawn from (seed, epoch). Ranks and workers only share out the numbers, so a stream that goes on
from a count of consumed samples goes on exactly, on any number of ranks and workers.
"""

import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from grpo.config import UserError
from grpo.data.dataset import ImageDataset, UnreadableImage
from grpo.data.images import normalize


class ImageBatch(NamedTuple):
    """Images of one step on this rank.

    images      [B, 3, H, W] fp32 in [-1, 1]
    class_ids   [B] int64
    sample_ids  [B] int64, running numbers over the whole run and all ranks: row ids of counter-based randomness
    indices     [B] int64, places in the data set, or None: keys of `CodeCache`
    """

    images: Tensor
    class_ids: Tensor
    sample_ids: Tensor
    indices: Tensor | None = None

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same batch on another device, except for `indices`: the host reads them, and must not wait for a GPU."""
        return ImageBatch(*(tensor.to(device) for tensor in self[:3]), self.indices)

    def parts(self, size: int) -> list["ImageBatch"]:
        """The batch in parts of at most `size` images."""
        starts = range(0, len(self.class_ids), size)
        return [ImageBatch(*(t if t is None else t[start : start + size] for t in self)) for start in starts]


class _Order:
    """The endless order: one permutation of N images after the other."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def candidates(self, sample_id: int) -> Iterator[int]:
        """Indices for a sample: its own, then the rest of its epoch's order, around, should images be unreadable."""
        epoch, place = divmod(sample_id, self.length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        for offset in range(self.length):
            yield int(self._permutation[(place + offset) % self.length])


class _Fetched(NamedTuple):
    """What a worker sends: uint8 pixels, a quarter of the traffic of fp32, and what went wrong as values.

    The loader would turn an exception into a traceback in another process's words.
    """

    pixels: Tensor | None  # [B, 3, S, S] uint8; None on failure
    indices: list[int]  # [B]
    unreadable: list[tuple[int, str]]  # met for the first time by this worker
    failure: UserError | None = None


class _Samples(Dataset):
    """The data set addressed by sample numbers instead of indices; runs in the workers."""

    def __init__(self, dataset: ImageDataset, order: _Order) -> None:
        self.dataset = dataset
        self.order = order
        self._unreadable: dict[int, str] = {}

    def __getitems__(self, sample_ids: range) -> _Fetched:
        known = len(self._unreadable)
        try:
            samples = [self._read(sample_id) for sample_id in sample_ids]
        except UserError as error:
            return _Fetched(None, [], list(self._unreadable.items())[known:], error)
        indices, pixels = zip(*samples, strict=True)
        return _Fetched(torch.stack(pixels), list(indices), list(self._unreadable.items())[known:])

    def _read(self, sample_id: int) -> tuple[int, Tensor]:
        """Index and pixels of the sample, or of the next readable image of the order."""
        for index in self.order.candidates(sample_id):
            if index in self._unreadable:
                continue
            try:
                return index, self.dataset.pixels(index)
            except UnreadableImage as error:
                self._unreadable[index] = str(error)
                if len(self._unreadable) > self.dataset.max_bad_images:
                    raise
        reason = next(reversed(self._unreadable.values()))
        raise UserError(f"none of the {len(self.dataset)} images of the data set can be read; the last: {reason}")


class _Slices:
    """Endless batch sampler: this rank's slice of each global batch, as sample numbers."""

    def __init__(self, *, batch_size: int, rank: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.offset = rank * batch_size
        self.stride = world_size * batch_size
        self.start = 0

    def __iter__(self) -> Iterator[range]:
        for first in itertools.count(self.start + self.offset, self.stride):
            yield range(first, first + self.batch_size)


def _as_is(fetched: _Fetched) -> _Fetched:
    return fetched


def _init_worker(worker_id: int) -> None:
    """Let only the parent end this worker.

    Ctrl-C, and the SIGTERM by which torchrun or a cluster asks a run to stop, reach the whole process group. A rank
    that still has to finish its step needs its workers for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ImageStream:
    """Endless iterator of `ImageBatch`; see `build_stream`.

    Attributes:
        samples: number of samples consumed by all ranks together. Batches that workers hold ready do not count.
    """

    def __init__(
        self, dataset: ImageDataset, *, batch_size: int, seed: int, num_workers: int, rank: int, world_size: int
    ) -> None:
        self.dataset = dataset
        self.samples = 0
        self._slices = _Slices(batch_size=batch_size, rank=rank, world_size=world_size)
        num_workers = min(num_workers, _available_cores())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 under torch 2.15
            self._loader = StatefulDataLoader(
                _Samples(dataset, _Order(len(dataset), seed)),
                batch_sampler=self._slices,
                num_workers=num_workers,
                collate_fn=_as_is,
                worker_init_fn=_init_worker,
                persistent_workers=num_workers > 0,
                generator=torch.Generator(),  # the global one would shift the run's randomness
            )
        self._fetched: Iterator[_Fetched] | None = None

    def __iter__(self) -> "ImageStream":
        return self

    def __next__(self) -> ImageBatch:
        """The next batch of this rank. Raises `UserError` when too many images are unreadable."""
        if self._fetched is None:
            self._slices.start = self.samples
            self._fetched = iter(self._loader)
        fetched = next(self._fetched)
        try:
            for index, reason in fetched.unreadable:
                self.dataset.record_unreadable(index, reason)
            if fetched.failure is not None:
                raise fetched.failure
        except UserError:
            self.close()
            raise
        first = self.samples + self._slices.offset
        self.samples += self._slices.stride
        return ImageBatch(
            images=normalize(fetched.pixels),
            class_ids=torch.from_numpy(self.dataset.class_ids[fetched.indices]),
            sample_ids=torch.arange(first, first + self._slices.batch_size),
            indices=torch.tensor(fetched.indices),
        )

    def close(self) -> None:
        """End the workers and the stream. Workers that a traceback keeps alive take seconds each to end."""
        self._fetched = self._loader = None

    def state_dict(self) -> dict[str, int]:
        """The number of samples consumed, the same on every rank."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many samples, also in the middle of an iteration."""
        self.samples = int(state["samples"])
        self._fetched = None


def build_stream(
    dataset: ImageDataset, *, batch_size: int, seed: int, num_workers: int, rank: int, world_size: int
) -> ImageStream:
    """Stream a data set for ever, reshuffled each epoch; no image is left out where epochs meet.

    A global batch is the next batch_size * world_size samples of the endless order, and rank r takes the r-th slice.
    An unreadable image is replaced by the next readable one of its epoch's order, so samples keep their numbers.

    Args:
        batch_size: images of one batch on this rank.
        seed: of the order.
        num_workers: loader processes of this rank, at most one a core is started; 0 loads in this process.

    Raises:
        UserError: the data set is smaller than one global batch.
    """
    if len(dataset) < batch_size * world_size:
        raise UserError(
            f"the data set has {len(dataset)} images, fewer than one batch of {batch_size} on each of {world_size} "
            "ranks: lower the batch size (rollout.batch_size in grpo.py, training.batch_size elsewhere) or add images"
        )
    return ImageStream(
        dataset, batch_size=batch_size, seed=seed, num_workers=num_workers, rank=rank, world_size=world_size
    )
