"""An endless, shuffled, resumable stream of batches that does not depend on the number of ranks or workers.

Samples are numbered 0, 1, 2, ... over the whole run. The number alone decides the image: epoch = number // N, and the
place in a permutation drawn from (seed, epoch). Ranks and workers only share out the numbers, so a stream that goes on
from a count of consumed samples goes on exactly, on any number of ranks and workers.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from grpo.config import UserError
from grpo.data.batch import ImageBatch
from grpo.data.captions import Asked
from grpo.data.dataset import NO_PIXELS, ImageDataset, UnreadableImage
from grpo.data.worker import init_worker, worker_count
from grpo.models import Condition
from grpo.parallel import World

if TYPE_CHECKING:
    from grpo.data.row_stream import RowStream


class _Fetched(NamedTuple):
    """What a worker sends. What went wrong is a value: the loader would make a traceback out of an exception."""

    pixels: Tensor | None  # [B, 3, S, S] uint8, a quarter of the traffic of fp32; None on failure
    indices: list[int]  # [B]
    unreadable: list[tuple[int, str]]  # met for the first time by this worker
    codes: Tensor | None = None  # [B, T] int64
    condition: Condition | None = None  # B rows
    captions: tuple[str, ...] = ()  # B texts
    failure: UserError | None = None


class _Samples(Dataset):
    """The data set addressed by sample numbers instead of indices; runs in the workers."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset, self.seed, self._epoch = dataset, seed, -1
        self._permutation = np.empty(0, dtype=np.int64)  # of the images in that epoch
        self._unreadable: dict[int, str] = {}

    def __getitem__(self, sample_ids: range) -> _Fetched:
        known = len(self._unreadable)
        try:
            samples = [self._read(sample_id) for sample_id in sample_ids]
        except UserError as error:
            return _Fetched(None, [], list(self._unreadable.items())[known:], failure=error)
        indices, pixels, codes, asked = zip(*samples, strict=True)
        codes = None if self.dataset.codes is None else torch.from_numpy(np.stack(codes))
        condition, captions = self.dataset.request(list(indices), asked)
        unreadable = list(self._unreadable.items())[known:]
        return _Fetched(torch.stack(pixels), list(indices), unreadable, codes, condition, tuple(captions))

    def _read(self, sample_id: int) -> tuple[int, Tensor, np.ndarray | None, Asked | None]:
        """Index, pixels, codes and text of the sample, or of the next readable image of its epoch's order, around."""
        length = len(self.dataset)
        epoch, place = divmod(sample_id, length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(length)
        for offset in range(length):
            index = int(self._permutation[(place + offset) % length])
            if index in self._unreadable:
                continue
            try:
                source = self.dataset.codes
                codes = None if source is None else source.draw(index, sample_id, self.seed)
                asked = self.dataset.ask(index, sample_id, self.seed)
                return index, self.dataset.pixels(index) if self.dataset.reads_images else NO_PIXELS, codes, asked
            except UnreadableImage as error:
                self._unreadable[index] = str(error)
                if len(self._unreadable) > self.dataset.data.max_bad_images:
                    raise
        reason = next(reversed(self._unreadable.values()))
        raise UserError(f"none of the {length} images of the data set can be read; the last: {reason}")


@dataclass(eq=False)
class ImageStream(Iterator[ImageBatch]):
    """Endless; `build_stream` has the arguments."""

    dataset: ImageDataset
    batch_size: int
    seed: int
    num_workers: int
    world: World
    samples: int = 0  # consumed by all ranks together; batches that workers hold ready do not count
    _fetched: Iterator[_Fetched] | None = None

    def __next__(self) -> ImageBatch:
        """The next batch of this rank. Raises `UserError` when too many images are unreadable."""
        size = self.batch_size // self.world.size
        first = self.samples + self.world.rank * size
        if self._fetched is None:
            self._fetched = self._fetch(range(i, i + size) for i in itertools.count(first, self.batch_size))
        fetched = next(self._fetched)
        try:
            for index, reason in fetched.unreadable:
                self.dataset.record_unreadable(index, reason)
            if fetched.failure is not None:
                raise fetched.failure
        except UserError:
            self.close()
            raise
        self.samples += self.batch_size
        assert fetched.pixels is not None
        assert fetched.condition is not None
        return ImageBatch(
            images=fetched.pixels,
            condition=fetched.condition,
            sample_ids=torch.arange(first, first + size),
            indices=torch.tensor(fetched.indices),
            captions=fetched.captions,
            codes=fetched.codes,
        )

    def _fetch(self, batches: Iterator[range]) -> Iterator[_Fetched]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 under torch 2.15
            loader = StatefulDataLoader(
                _Samples(self.dataset, self.seed),
                sampler=batches,
                batch_size=None,  # for the loader a batch is one item
                num_workers=self.num_workers,
                worker_init_fn=init_worker,
                generator=torch.Generator(),  # the global one would shift the run's randomness
            )
            return iter(loader)

    def close(self) -> None:
        """End the workers and the stream. Workers that a traceback keeps alive take seconds each to end."""
        self._fetched = None

    def state_dict(self) -> dict[str, int]:
        """The number of samples consumed, the same on every rank."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many samples, also in the middle of an iteration."""
        self.samples = int(state["samples"])
        self.close()


def build_stream(
    dataset: ImageDataset, *, batch_size: int, seed: int, num_workers: int, world: World
) -> "ImageStream | RowStream":
    """Stream a data set for ever, reshuffled each epoch; no image is left out where epochs meet.

    A batch is the next `batch_size` samples of the endless order, of which rank r takes the r-th slice. An unreadable
    image is replaced by the next readable one of its epoch's order, so samples keep their numbers.

    Args:
        batch_size: images of one batch over all ranks.
        seed: of the order.
        num_workers: loader processes of this rank, at most one a core is started; 0 loads in this process.

    Raises:
        UserError: a batch cannot be shared by the ranks, or has more images than the data set.
    """
    keys = "rollout.batch_size for `grpo train`, training.batch_size for the other jobs"
    if batch_size % world.size:
        raise UserError(
            f"a batch of {batch_size} images cannot be shared by {world.size} ranks: make it a multiple of "
            f"{world.size} ({keys}) or start fewer ranks"
        )
    if dataset.is_stream:
        from grpo.data.row_stream import RowStream
        from grpo.data.streamed import StreamedDataset

        assert isinstance(dataset, StreamedDataset)
        return RowStream(dataset, batch_size, seed, num_workers, world)
    if dataset.has_images and len(dataset) < batch_size:
        raise UserError(
            f"the data set has {len(dataset)} images, fewer than one batch of {batch_size}: lower the batch size "
            f"({keys}) or add images"
        )
    has_work = dataset.reads_images or dataset.codes or dataset.requests
    workers = worker_count(num_workers) if has_work else 0
    return ImageStream(dataset, batch_size, seed, workers, world)
