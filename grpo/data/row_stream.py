"""Rows of a data set that is only read from front to back, such as one behind a network address.

`datasets` reads the rows, with its own state by which it goes on in the middle of a file. Here they are put into an
order of their own: each epoch takes the files in another order, and each window of `data.shuffle_window` rows is
permuted, both by the seed. Every rank reads all rows and decodes its own, so that neither the order nor the state
depends on the number of ranks; going on reads the window again that a run was in.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo.config import UserError
from grpo.data.batch import ImageBatch
from grpo.data.captions import pick_text
from grpo.data.images import center_crop, to_pixels
from grpo.data.streamed import StreamedDataset
from grpo.data.unreadable import UnreadableImage
from grpo.data.worker import worker_count
from grpo.models import ClassCondition, Condition
from grpo.parallel import World


class Place(NamedTuple):
    """Where in the endless order of rows a run is."""

    epoch: int = 0
    window: int = 0
    row: int = 0  # of the window's permutation
    source: dict | None = None  # state of `datasets` where the window begins; None is the beginning of the epoch


class _Prepared(NamedTuple):
    batch: ImageBatch
    after: Place
    unreadable: list[tuple[int, str]]


@dataclass(eq=False)
class RowStream(Iterator[ImageBatch]):
    """Endless, as `ImageStream`. The next batch is prepared while a step works on this one."""

    dataset: StreamedDataset
    batch_size: int
    seed: int
    num_workers: int
    world: World
    samples: int = 0  # consumed by all ranks together
    _place: Place = field(default_factory=Place)
    _next: Future | None = None

    def __post_init__(self) -> None:
        self._rows: Iterator[tuple[dict, Place]] | None = None
        self._ahead = ThreadPoolExecutor(1)
        self._decoders = ThreadPoolExecutor(max(1, worker_count(self.num_workers)))

    def __next__(self) -> ImageBatch:
        """The next batch of this rank. Raises `UserError` when a row or too many images are unreadable."""
        if self._next is None:
            self._rows = self._in_order(self._place)
            self._next = self._ahead.submit(self._prepare, self.samples)
        try:
            prepared: _Prepared = self._next.result()
            for number, reason in prepared.unreadable:
                self.dataset.record_unreadable(number, reason)
        except UserError:
            self.close()
            raise
        self.samples, self._place = self.samples + self.batch_size, prepared.after
        self._next = self._ahead.submit(self._prepare, self.samples)
        return prepared.batch

    def _prepare(self, start: int) -> _Prepared:
        """The batch that begins with that sample number."""
        assert self._rows is not None, "`__next__` has begun"
        rows, places = zip(*islice(self._rows, self.batch_size), strict=True)
        size = self.batch_size // self.world.size
        first = self.world.rank * size
        found = list(self._decoders.map(partial(self._readable, rows), range(first, first + size)))
        sample_ids = range(start + first, start + first + size)
        condition, captions = self._request([row for row, _, _ in found], sample_ids)
        batch = ImageBatch(
            images=torch.stack([pixels for _, pixels, _ in found]),
            condition=condition,
            sample_ids=torch.tensor(sample_ids),
            captions=captions,
        )
        return _Prepared(batch, places[-1], [bad for *_, met in found for bad in met])

    def _request(self, rows: Sequence[dict], sample_ids: Sequence[int]) -> tuple[Condition, list[str]]:
        """What rows ask for, and the same in words."""
        requests = self.dataset.requests
        if requests is not None:
            of_rows = zip(map(self.dataset.texts, rows), sample_ids, strict=True)
            texts = [pick_text(texts, number, self.seed) for texts, number in of_rows]
            return requests.encoder(texts), texts
        condition = ClassCondition(torch.tensor([self.dataset.class_id(row) for row in rows]))
        return condition, self.dataset.captions(condition)

    def _require_text(self, row: dict) -> None:
        """Raise `UnreadableImage` where a row is asked for a text and has none, or one without features."""
        if self.dataset.requests is not None:
            texts = self.dataset.texts(row)
            try:
                self.dataset.requests.encoder.require(texts)
            except UserError as error:
                raise UnreadableImage(error.problems) from error

    def _readable(self, rows: Sequence[dict], place: int) -> tuple[dict, Tensor, list[tuple[int, str]]]:
        """The row at that place of the batch, or the next readable one, around; its pixels; the unreadable ones."""
        unreadable = []
        for row in (*rows[place:], *rows[:place]):
            try:
                self._require_text(row)
                pixels = to_pixels(center_crop(self.dataset.image(row), self.dataset.data.image_size))
            except UnreadableImage as error:
                unreadable.append((self.dataset.key(row), str(error)))
            else:
                return row, pixels, unreadable
        raise UserError(f"none of the {len(rows)} images of a batch can be read; the last: {unreadable[-1][1]}")

    def _in_order(self, place: Place) -> Iterator[tuple[dict, Place]]:
        """The rows from a place on, each with the place after it."""
        while True:
            source, is_empty = self.dataset.rows(self.seed, place.epoch, place.source), place.source is None
            iterator, begin = iter(source), place.source
            while window := list(self.dataset.guarded(islice(iterator, self.dataset.data.shuffle_window))):
                is_empty = False
                order = np.random.default_rng((self.seed, place.epoch, place.window, 2)).permutation(len(window))
                for row in range(place.row, len(window)):
                    yield window[order[row]], place._replace(row=row + 1, source=begin)
                place = place._replace(window=place.window + 1, row=0)
                begin = source.state_dict()
            if is_empty:
                raise UserError(f"data.path {self.dataset.data.path} has no rows: check the files")
            place = Place(epoch=place.epoch + 1)

    def close(self) -> None:
        """Stop reading ahead; the stream can go on from where it is."""
        if self._next is not None:
            self._next.cancel()
            self._next.exception() if not self._next.cancelled() else None
            self._next = None

    def state_dict(self) -> dict[str, Any]:
        """The number of samples consumed and the place of the next row, the same on every rank."""
        return {"samples": self.samples, "place": self._place._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises a UserError where the state is that of another kind of data set."""
        self.close()
        try:
            place = Place(**state["place"])
        except (KeyError, TypeError) as error:
            raise UserError(
                'the checkpoint is of a run on another kind of data set than data.name = "stream"'
            ) from error
        self.samples, self._place = int(state["samples"]), place
