"""Images with captions in a folder, and lists of prompts."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grpo.config import Data, UserError, read_text, reading, text_lines
from grpo.data.captions import Captions, LeftOut, texts_in, texts_of
from grpo.data.dataset import ImageDataset
from grpo.data.folder import IMAGE_SUFFIXES, ImageFiles, split_folder
from grpo.data.folder_scan import scan_folder
from grpo.data.index_cache import on_main_rank
from grpo.texts import read_objects, read_prompts

METADATA, CAPTION_TABLE = "metadata.jsonl", "captions.json"
FILE_KEYS = ("file_name", "image_path", "image", "file")
CAPTION_SUFFIX = ".txt"
LONGEST_NAME = 4096  # letters of a file with its folders
LARGEST_TABLE = 2**32  # bytes of captions.json; COCO's has 2**27


class Captioned(NamedTuple):
    """An image file and its captions."""

    file: str  # relative to the folder, or absolute
    texts: list[str]


class ListedIn(NamedTuple):
    """A line of one of LlamaGen's lists, by which its features are found."""

    name: str  # of the list, without .jsonl
    line: int  # from 0


class CaptionFolder(ImageFiles):
    """A folder of images with captions, in the first of these forms that is there:

    - `metadata.jsonl`: objects with file_name and a text, a line an image;
    - `captions.json`: {file: text or texts}, a list of such objects, or COCO's {images, annotations};
    - LlamaGen's lists: other `.jsonl` of objects with image_path and a text or texts;
    - text files beside the images, a caption a line: `a/1.txt` of `a/1.jpg`.

    Rank 0 looks, for all ranks. An image without a caption is left out and counted.

    Attributes:
        listed: of LlamaGen's lists, the place of each image in them; otherwise empty.
    """

    def __init__(self, *, data: Data) -> None:
        root = split_folder(data)
        images, listed = on_main_rank(lambda: _find(root, data))
        self.listed: list[ListedIn] = listed
        sizes = [_size(root / image.file) for image in images] if len(images) <= MOST_SIZES else []
        captions = Captions([image.texts for image in images])
        files = [image.file for image in images]
        super().__init__(files, [0] * len(files), [], data=data, root=root, sizes=sizes, captions=captions)


MOST_SIZES = 1 << 20  # files whose sizes are part of the fingerprint: to ask for more takes minutes
FORMS = "metadata.jsonl, captions.json, LlamaGen's lists, or a .txt beside each image"


class PromptList(ImageDataset):
    """Texts without images in `data.path`, each asked for once an epoch. Its images are empty, [3, 0, 0]."""

    has_images = False

    def __init__(self, *, data: Data) -> None:
        prompts = on_main_rank(lambda: read_prompts(data.place, key=data.caption_key))
        captions = Captions([[prompt.text] for prompt in prompts])
        super().__init__(np.zeros(len(prompts)), [], data=data, captions=captions)

    def identify(self) -> Iterable[bytes]:
        return ()

    def describe(self, index: int) -> str:
        return f"prompt {index} of {self.data.path}"

    def open(self, index: int) -> Image.Image:
        raise NotImplementedError("prompts have no images")


def has_captions(folder: Path) -> bool:
    """Whether a folder is one of images with captions, and not of classes or shards."""
    if (folder / METADATA).is_file() or (folder / CAPTION_TABLE).is_file():
        return True
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "."]
    stems = {os.path.splitext(name)[0] for name in names if name.endswith(CAPTION_SUFFIX)}
    return any(name.endswith(".jsonl") for name in names) or any(
        name.lower().endswith(IMAGE_SUFFIXES) and os.path.splitext(name)[0] in stems for name in names
    )


def _find(root: Path, data: Data) -> tuple[list[Captioned], list[ListedIn]]:
    left_out = LeftOut(data)
    listed: list[ListedIn] = []
    found: Iterable[Captioned]
    if (root / METADATA).is_file():
        found = _of_objects(read_objects(root / METADATA), data, left_out)
    elif (root / CAPTION_TABLE).is_file():
        found = _of_objects(_table(root / CAPTION_TABLE), data, left_out)
    elif lists := sorted(root.glob("*.jsonl")):
        last = len(lists) if data.last_list < 0 else data.last_list + 1
        chosen = lists[data.first_list : last]
        if not chosen:
            raise UserError(f"data.first_list and data.last_list leave none of the {len(lists)} lists in {root}")
        of_lists: list[Captioned] = []
        for file in chosen:
            lines = read_objects(file)
            for line, entry in enumerate(lines):
                if images := list(_of_objects([entry], data, left_out)):
                    of_lists += images
                    listed.append(ListedIn(file.stem.partition(".")[0], line))
        found = of_lists
    else:
        found = _beside(root, left_out)
    images = list(found)
    if not images:
        first = left_out.first and f" ({left_out.first})"
        raise UserError(f"data.path {root} has no images with captions: {FORMS}{first}")
    left_out.tell()
    return images, listed


def _of_objects(entries: Iterable[tuple[str, Mapping[str, Any]]], data: Data, left_out: LeftOut) -> Iterator[Captioned]:
    for where, entry in entries:
        file = next((entry[key] for key in FILE_KEYS if key in entry), None)
        if file is None or not _can_be_file(file):
            raise UserError(f"{where} names no image: give its file in {', '.join(FILE_KEYS)}")
        texts = texts_of(entry, data.caption_key, where)
        if texts:
            yield Captioned(file, texts)
        else:
            left_out.note(f"{where} ({file}) has no {data.caption_key or 'caption'}")


def _can_be_file(name: object) -> bool:
    """Whether it is a name that a file may have: JSON can hold half of a surrogate pair, or a book."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or "\0" in name:
        return False
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _table(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """captions.json as objects with file_name and text."""
    with reading(f"{file} cannot be read"):
        table = json.loads(read_text(file, largest=LARGEST_TABLE))
    if isinstance(table, dict) and {"images", "annotations"} <= table.keys():
        with reading(f"{file} is not as COCO's"):
            names = {image["id"]: image["file_name"] for image in table["images"]}
            texts: dict[Any, list[Any]] = {number: [] for number in names}
            for note in table["annotations"]:
                texts[note["image_id"]].append(note["caption"])
        table = [{"file_name": name, "text": texts[number]} for number, name in names.items()]
    if isinstance(table, dict):
        table = [{"file_name": name, "text": value} for name, value in table.items()]
    if not isinstance(table, list) or not all(isinstance(entry, dict) for entry in table):
        raise UserError(f"{file} is no table of captions: {{file: text}}, a list of objects, or COCO's")
    for number, entry in enumerate(table):
        yield f"{file}: entry {number}", entry


def _beside(root: Path, left_out: LeftOut) -> Iterator[Captioned]:
    listings = scan_folder(root, suffixes=(*IMAGE_SUFFIXES, CAPTION_SUFFIX))
    for folder in sorted(listings):
        names = listings[folder].files
        texts = {name.removesuffix(CAPTION_SUFFIX) for name in names if name.endswith(CAPTION_SUFFIX)}
        for name in (name for name in names if not name.endswith(CAPTION_SUFFIX)):
            file, stem = os.path.join(folder, name), os.path.splitext(name)[0]
            path = root / folder / f"{stem}{CAPTION_SUFFIX}"
            found: list[str] = []
            if stem in texts:
                with reading(f"{path} cannot be read"):
                    found = texts_in(text_lines(read_text(path)), str(path))
            if found:
                yield Captioned(file, found)
            else:
                left_out.note(f"{root / file} has no caption (its {stem}{CAPTION_SUFFIX})")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
