"""Images with classes or captions in WebDataset shards."""

import io
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grpo.config import Data, UserError, reading, text_lines
from grpo.data.captions import Captions, LeftOut, texts_in, texts_of
from grpo.data.dataset import ImageDataset
from grpo.data.folder_scan import THREADS
from grpo.data.images import read_image
from grpo.data.index_cache import (
    SETTLED_NS,
    cache_folder,
    index_file,
    on_main_rank,
    pack,
    read_index,
    unpack,
    write_index,
)
from grpo.data.shard_files import shard_files, shard_root
from grpo.data.tar_files import LARGEST_TEXT, Member, TarReader, TarSample, read_samples

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
NO_TEXTS = "[]"  # in place of a label, of a sample without a caption
LONGEST_LABEL = 200  # characters
JSON_KEYS = ("label", "cls", "class_id")
_ARRAYS = ("names", "states", "counts", "keys", "labels", "offsets", "sizes")


class ShardIndex(NamedTuple):
    """The samples with images of one shard."""

    state: tuple[int, int]  # size of the file, and when it was changed, ns
    keys: list[str]
    labels: list[str]  # as they are written: a number, or the name of a class; or a list of captions, as JSON
    offsets: list[int]
    sizes: list[int]


class TarDataset(ImageDataset):
    """Samples of WebDataset shards: an image, and a label in `cls` or in a `json` under label, cls or class_id.

    Or else, with captions, texts in `txt`, one a line, or in a `json`; samples without are left out and counted.
    Labels are all integers, class ids, or all names of classes. Where an image and its label lie is found out by rank
    0, once, and kept; a shard whose size and time stamp are the same is not read again.

    Raises:
        UserError: a shard that is no tar or damaged, a sample without a label, or no image at all.
    """

    def __init__(self, *, data: Data, with_captions: bool = False) -> None:
        paths = shard_files(data, ".tar")
        root = shard_root(data)
        shards = on_main_rank(partial(_remembered, data, root, paths, with_captions))
        captions = None
        if with_captions:
            shards, captions = _captioned(shards, paths, data)
        counts = [len(shard.keys) for shard in shards]
        if not sum(counts):
            ending = "txt" if with_captions else "cls"
            raise UserError(
                f"data.path {data.path} has no images: members are named KEY.jpg, KEY.png, ... and KEY.{ending}"
            )
        self._root, self._reader = root, TarReader(paths)
        self._shard = np.repeat(np.arange(len(shards)), counts)
        self._keys = np.array([os.fsencode(key) for shard in shards for key in shard.keys])
        self._offsets = np.concatenate([np.array(shard.offsets, dtype=np.int64) for shard in shards])
        self._sizes = np.concatenate([np.array(shard.sizes, dtype=np.int64) for shard in shards])
        if captions is not None:
            super().__init__(np.zeros(len(captions)), [], data=data, captions=captions)
            return
        class_ids, names = to_class_ids([label for shard in shards for label in shard.labels], str(data.path))
        super().__init__(class_ids, names, data=data)

    def identify(self) -> Iterable[bytes]:
        names = "\0".join(os.path.relpath(path, self._root) for path in self._reader.paths)
        return os.fsencode(names), self._keys.tobytes(), self._offsets.tobytes(), self._sizes.tobytes()

    def open(self, index: int) -> Image.Image:
        member = Member(int(self._offsets[index]), int(self._sizes[index]))
        return read_image(io.BytesIO(self._reader.read(int(self._shard[index]), member)))

    def describe(self, index: int) -> str:
        return f"{os.fsdecode(self._keys[index])!r} in {self._reader.paths[self._shard[index]]}"


def to_class_ids(labels: list[str], source: str) -> tuple[np.ndarray, list[str]]:
    """Labels as written -> class ids [N] and the names of the classes, of which there are none for integers."""
    try:
        numbers = {label: int(label) for label in set(labels)}
    except ValueError:
        names = sorted(set(labels))
        if number := next((name for name in names if name.lstrip("-").isdecimal()), None):
            word = next(name for name in names if not name.lstrip("-").isdecimal())
            raise UserError(f"{source} has both {number} and {word!r} for labels: use numbers or names") from None
        numbers = {name: place for place, name in enumerate(names)}
        return np.array([numbers[label] for label in labels], dtype=np.int64), names
    if outside := [label for label, number in numbers.items() if not -(2**62) < number < 2**62]:
        raise UserError(f"{source} has the label {outside[0][:40]}: labels count from 0")
    return np.array([numbers[label] for label in labels], dtype=np.int64), []


def _captioned(shards: list[ShardIndex], paths: list[Path], data: Data) -> tuple[list[ShardIndex], Captions]:
    """The same shards without the samples that have no caption, and the captions."""
    texts, kept, left_out = [], [], LeftOut(data)
    for shard, path in zip(shards, paths, strict=True):
        samples = list(zip(*shard[1:], strict=True))  # key, label, offset and size of each
        for key, label, *_ in samples:
            if label == NO_TEXTS:
                left_out.note(f"{key!r} in {path} has no caption (its .txt, or a text in its .json)")
        found = [sample for sample in samples if sample[1] != NO_TEXTS]
        texts += [json.loads(label) for _, label, *_ in found]
        columns = [list(column) for column in zip(*found, strict=True)] or [[], [], [], []]
        kept.append(ShardIndex(shard.state, *columns))
    left_out.tell()
    return kept, Captions(texts)


def _remembered(data: Data, root: Path, paths: list[Path], with_captions: bool) -> list[ShardIndex]:
    """The index of each shard, of which only those that have changed are read."""
    kind = f"captions {data.caption_key or ''}" if with_captions else ""
    place = f"{root}/{data.split}/{Path(data.place).name}"
    index = index_file(cache_folder(data.index_cache, root), "tar", f"{place}/{kind}" if kind else place)
    read = partial(index_shard, label=partial(_texts, key=data.caption_key)) if with_captions else index_shard
    known = _read(index)
    names, states = [os.path.relpath(path, root) for path in paths], [_state(path) for path in paths]
    pairs = list(zip(names, states, strict=True))
    is_known = [bool(state[1]) and name in known and known[name].state == state for name, state in pairs]
    unknown = [path for path, found in zip(paths, is_known, strict=True) if not found]
    with ThreadPoolExecutor(THREADS) as threads:
        indexed = iter(list(threads.map(read, unknown)))
    shards = [known[name] if found else next(indexed) for name, found in zip(names, is_known, strict=True)]
    if unknown or len(known) != len(names):
        _write(index, dict(zip(names, shards, strict=True)))
    return shards


def index_shard(path: Path, label: Callable[[TarSample, TarReader, Path], str] | None = None) -> ShardIndex:
    """Find images and labels of one shard; `label` reads the latter of a sample. Raises a UserError."""
    label = label or _label
    state, reader = _state(path), TarReader([path])
    keys, labels, offsets, sizes = [], [], [], []
    for sample in read_samples(path):
        ending = next((ending for ending in IMAGE_ENDINGS if ending in sample.members), None)
        if ending is not None:
            keys.append(sample.key)
            labels.append(label(sample, reader, path))
            offsets.append(sample.members[ending].offset)
            sizes.append(sample.members[ending].size)
    return ShardIndex(state, keys, labels, offsets, sizes)


def _label(sample: TarSample, reader: TarReader, path: Path) -> str:
    """The label of a sample, as text."""
    where = f"{sample.key!r} in {path}"
    ending = next((ending for ending in ("cls", "json") if ending in sample.members), None)
    if ending is None:
        raise UserError(f"{where} has no label: a member KEY.cls with the class, or KEY.json with a key label")
    member = sample.members[ending]
    if member.size > LARGEST_TEXT:
        raise UserError(f"{where}: its .{ending} has {member.size} bytes, which is no label")
    try:
        text = reader.read(0, member).decode("utf-8")
        label = text.strip() if ending == "cls" else _of_json(json.loads(text))
        label.encode()  # JSON can hold half of a surrogate pair
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: its .{ending} cannot be read: {error}") from error
    if not 0 < len(label) <= LONGEST_LABEL or "\0" in label:
        raise UserError(f"{where}: its .{ending} has no label (in .json under {', '.join(JSON_KEYS)})")
    return label


def _texts(sample: TarSample, reader: TarReader, path: Path, *, key: str | None) -> str:
    """The captions of a sample, a JSON list."""
    where = f"{sample.key!r} in {path}"
    ending = next((ending for ending in ("txt", "json") if ending in sample.members), None)
    if ending is None:
        return NO_TEXTS
    member = sample.members[ending]
    if member.size > LARGEST_TEXT:
        raise UserError(f"{where}: its .{ending} has {member.size} bytes, which is no caption")
    with reading(f"{where}: its .{ending} cannot be read"):
        content = reader.read(0, member).decode("utf-8-sig")
        value: Any = text_lines(content) if ending == "txt" else json.loads(content)
        if ending == "json" and not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    return json.dumps(texts_in(value, where) if ending == "txt" else texts_of(value, key, where))


def _of_json(value: object) -> str:
    found = next((value[key] for key in JSON_KEYS if key in value), None) if isinstance(value, dict) else None
    return str(found) if type(found) in (int, str) else ""


def _state(path: Path) -> tuple[int, int]:
    """What a changed file would have another of; the time is 0 where it is too recent to tell."""
    status = path.stat()
    recent = abs(time.time_ns() - status.st_mtime_ns) < SETTLED_NS
    return status.st_size, 0 if recent else status.st_mtime_ns


def _write(index: Path | None, shards: dict[str, ShardIndex]) -> None:
    each = list(shards.values())
    arrays = {
        "names": pack(list(shards)),
        "states": np.array([shard.state for shard in each], dtype=np.int64).reshape(-1, 2),
        "counts": np.array([len(shard.keys) for shard in each], dtype=np.int64),
        "keys": pack([key for shard in each for key in shard.keys]),
        "labels": pack([label for shard in each for label in shard.labels]),
        "offsets": np.array([offset for shard in each for offset in shard.offsets], dtype=np.int64),
        "sizes": np.array([size for shard in each for size in shard.sizes], dtype=np.int64),
    }
    write_index(index, arrays)


def _read(index: Path | None) -> dict[str, ShardIndex]:
    """The shards in an index file; none from one that is damaged or has a member that is not inside its file."""
    arrays = read_index(index, _ARRAYS)
    if arrays is None:
        return {}
    try:
        counts, states = arrays["counts"].tolist(), arrays["states"].reshape(-1, 2).tolist()
        offsets, sizes = arrays["offsets"].astype(np.int64), arrays["sizes"].astype(np.int64)
        names, total = unpack(arrays["names"], len(counts)), len(offsets)
        keys, labels = unpack(arrays["keys"], total), unpack(arrays["labels"], total)
        whole = np.repeat(np.array(states, dtype=np.int64)[:, 0], counts)
        if (offsets < 0).any() or (sizes < 0).any() or (offsets > whole - sizes).any():
            return {}
    except (ValueError, TypeError, IndexError):
        return {}
    shards, start = {}, 0
    for name, count, state in zip(names, counts, states, strict=True):
        rows = slice(start, start + count)
        shards[name] = ShardIndex(tuple(state), keys[rows], labels[rows], offsets[rows].tolist(), sizes[rows].tolist())
        start += count
    return shards
