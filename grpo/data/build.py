"""From the recipe's section to a checked data set."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo.config import Data, Model, Text, UserError
from grpo.data.builtin import Digits, Synthetic
from grpo.data.caption_files import CaptionFolder, PromptList, has_captions
from grpo.data.captions import CaptionRequests, Captions
from grpo.data.class_ids import find_class_ids, implied_classes
from grpo.data.class_list import ClassList
from grpo.data.class_map import is_class_id, nfc, read_class_map
from grpo.data.code_list import CodeList
from grpo.data.dataset import ImageDataset
from grpo.data.folder import ImageFolder
from grpo.data.llamagen_requests import LlamaGenRequests
from grpo.data.shapes import Shapes
from grpo.data.webdataset import TarDataset
from grpo.models import numbered
from grpo.texts import build_encoder

LARGEST_LABEL = 2**24


def build_dataset(
    data: Data, *, num_classes: int | None, learned: Sequence[str] = (), new_classes: int = 0
) -> ImageDataset:
    """Open the data set of classes that the section names; labels are checked, and compared with the model's, here.

    Args:
        num_classes: labels must be below it; fewer classes in the data are fine. None where images alone matter, which
            may then be captioned.
        learned: names of the classes that the model has learned (`learned_classes`); () lets the data define the ids.
        new_classes: the last classes of the model, each of which must have images (`model.new_classes`).

    Raises:
        UserError: no such folder, not a data set, no such split or column, empty, a label out of range, a class whose
            id would be a guess (`find_class_ids`).
    """
    with_captions = num_classes is None and (data.caption_key is not None or _kind(data) in ("captions", "prompts"))
    dataset = _open(data, num_classes=num_classes or 10, learned=learned, with_captions=with_captions)
    dataset.num_classes = num_classes
    if len(dataset) == 0 and not dataset.is_stream:
        raise UserError(f"data.path {data.path} has no images in split {data.split!r}")
    if dataset.class_ids.max(initial=-1) >= LARGEST_LABEL:
        index = int(dataset.class_ids.argmax())
        raise UserError(f"{dataset.describe(index)} has label {dataset.class_ids[index]}: no data set has such a class")
    if with_captions:
        return dataset
    if num_classes is None:
        num_classes = max(len(dataset.class_names), int(dataset.class_ids.max(initial=-1)) + 1)
        dataset.class_names += numbered(num_classes)[len(dataset.class_names) :]
        return dataset
    if data.name != "classes":
        _match_classes(dataset, num_classes=num_classes, learned=learned)
        if len(dataset):  # a stream's numbers are not known before they come
            _require_new_classes(dataset, num_classes=num_classes, new_classes=new_classes)
    if len(outside := np.flatnonzero((dataset.class_ids < 0) | (dataset.class_ids >= num_classes))):
        others = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        raise UserError(
            f"{dataset.describe(outside[0])} has label {dataset.class_ids[outside[0]]}{others}, outside 0.."
            f"{num_classes - 1}: correct the label or set num_classes (now {num_classes}) of the recipe's [model], or "
            "[classifier], to the number of classes"
        )
    if not learned and data.name != "classes" and len(dataset):
        dataset.remarks += _without_images(dataset, num_classes=num_classes)
    return dataset


def build_text_dataset(data: Data, text: Text, model: Model) -> ImageDataset:
    """Open the data set of texts, most often with images, that the section names, for a text-conditional model.

    Raises:
        UserError: no such data set, or one without captions; features that are not there, or of another width.
    """
    if data.name == "stream" or (data.name == "imagenet" and "://" in (data.path or "")):
        dataset = _open(data, num_classes=1, learned=(), with_captions=True)
        dataset.requests = CaptionRequests(Captions([]), build_encoder(text, model))
        return dataset
    dataset = open_captions(data)
    if text.llamagen_features is not None and text.encoder == "t5":
        dataset.requests = LlamaGenRequests(dataset, text, model)
        return dataset
    encoder = build_encoder(text, model)
    assert dataset.captions_of is not None
    encoder.require(dataset.captions_of.distinct())
    dataset.requests = CaptionRequests(dataset.captions_of, encoder)
    return dataset


def open_captions(data: Data) -> ImageDataset:
    """The data set of texts that the section names; its samples do not ask for anything yet."""
    dataset = _open(data, num_classes=1, learned=(), with_captions=True)
    assert dataset.captions_of is not None
    return dataset


def _match_classes(dataset: ImageDataset, *, num_classes: int, learned: Sequence[str]) -> None:
    """Class ids and names of the data set become the model's."""
    data, labels, names = dataset.data, dataset.class_ids, dataset.class_names
    if data.class_map is not None and not names:
        if dataset.is_stream:
            raise UserError(f"data.class_map needs names of classes, and data.path {data.path} has none")
        names = list(numbered(int(labels.max()) + 1))
    learned = learned or implied_classes(names, num_classes=num_classes)
    titles = [*learned, *numbered(num_classes)[len(learned) :]]
    is_named = (labels >= 0) & (labels < len(names))
    if is_named.any():
        class_map = None if data.class_map is None else read_class_map(data.class_map)
        class_ids = find_class_ids(
            names,
            num_classes=num_classes,
            learned=learned,
            class_map=class_map,
            used=np.unique(labels[is_named]).tolist(),
            source=f"data.path {data.path}" if data.path else f'data.name = "{data.name}"',
        )
        dataset.class_ids = np.where(is_named, np.array(class_ids)[np.where(is_named, labels, 0)], labels)
        for name, class_id in zip(names, class_ids, strict=True):
            if 0 <= class_id < num_classes and titles[class_id] == str(class_id):
                said = (class_map or {}).get(nfc(name), name)
                titles[class_id] = name if is_class_id(said) else said
    dataset.class_names = titles


def _without_images(dataset: ImageDataset, *, num_classes: int) -> list[str]:
    """A line, where a network that has learned nothing yet will know less than `num_classes` classes."""
    found = np.unique(dataset.class_ids)
    if len(found) == num_classes:
        return []
    remedy = f"; set num_classes = {len(found)} if these are all" if found[-1] + 1 == len(found) else ""
    others = f"{num_classes - len(found)} are never learned"
    return [f"the data have images of {len(found)} of num_classes = {num_classes} classes, {others}{remedy}"]


def _require_new_classes(dataset: ImageDataset, *, num_classes: int, new_classes: int) -> None:
    """Every class that a model is to learn beside those it has must have images."""
    found = set(np.unique(dataset.class_ids).tolist())
    new = range(num_classes - new_classes, num_classes)
    if without := [class_id for class_id in new if class_id not in found]:
        learned = [dataset.class_names[class_id] for class_id in sorted(found) if 0 <= class_id < new.start]
        known = f" (of the model's classes they have {', '.join(map(repr, learned[:4]))})" if learned else ""
        names = [dataset.class_names[class_id] for class_id in without]
        named = ", ".join(repr(name) for name in names if not name.isdecimal())
        count = new_classes - len(without)
        raise UserError(
            f"the data have images of {count} new class{'es' * (count != 1)}{f', none of {named}' if named else ''}"
            f"{known}, and model.new_classes = {new_classes}: add images, lower model.new_classes and "
            f"model.num_classes by {len(without)}, or say in data.class_map which class is which"
        )


def _open(data: Data, *, num_classes: int, learned: Sequence[str], with_captions: bool) -> ImageDataset:
    if data.name == "classes":
        return ClassList(data=data, num_classes=num_classes, learned=tuple(learned))
    if data.name == "digits":
        return Digits(data=data, with_captions=with_captions)
    if data.name == "synthetic":
        return Synthetic(data=data, num_classes=num_classes, with_captions=with_captions)
    if data.name == "shapes":
        return Shapes(data=data, with_captions=with_captions)
    if data.path is None:
        raise UserError(f"data.path is missing: data.name = {data.name!r} reads a folder")
    if data.name == "codes":
        return CodeList(data=data)
    if data.name == "prompts":
        return PromptList(data=data)
    if data.name == "stream" or (data.name == "imagenet" and "://" in data.path):
        from grpo.data.streamed import StreamedDataset  # here, for `datasets` takes seconds

        return StreamedDataset(data=data, with_captions=with_captions)
    kind = _kind_at(Path(data.path), data)
    if with_captions and kind == "folder":  # whose captions may stand deeper, beside the images
        kind = "captions"
    if not with_captions and kind in ("captions", "prompts"):
        raise UserError(f"data.path {data.path} {_KINDS[kind]}, and this model takes classes: set model.caption_dim")
    if data.name not in ("imagenet", kind):
        raise UserError(
            f"data.path {data.path} {_KINDS[kind]}; data.name = {data.name} is for what {_KINDS[data.name]}: set "
            f"data.name to {kind}, or correct data.path"
        )
    if kind == "folder":
        return ImageFolder(data=data)
    if kind in ("captions", "prompts"):
        return CaptionFolder(data=data) if kind == "captions" else PromptList(data=data)
    if kind == "webdataset":
        return TarDataset(data=data, with_captions=with_captions)
    if kind == "parquet":
        from grpo.data.parquet import ParquetDataset

        return ParquetDataset(data=data, with_captions=with_captions)
    from grpo.data.huggingface import SavedDataset

    return SavedDataset(data=data, with_captions=with_captions)


_KINDS = {
    "huggingface": "was written by save_to_disk (it has dataset_dict.json or state.json)",
    "webdataset": "is or holds tar files",
    "parquet": "is or holds Parquet files",
    "folder": "holds folders of images",
    "captions": "holds images with captions",
    "prompts": "holds prompts",
}


def _kind(data: Data) -> str:
    """Which kind of data set the section means, as far as its name and its path tell."""
    is_at = data.name == "imagenet" and data.path is not None and "://" not in data.path
    return _kind_at(Path(data.place), data) if is_at else data.name


def _kind_at(path: Path, data: Data) -> str:
    """Which kind of data set in files is at `path`. Raises a UserError where there is nothing."""
    suffixes = {".tar": "webdataset", ".parquet": "parquet"}
    if not path.is_dir():
        if path.suffix in (".txt", ".jsonl") and path.is_file():
            return "prompts"
        if path.suffix in suffixes:  # a file, or a pattern of files
            return suffixes[path.suffix]
        state = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"data.path {path} {state}: give the folder of the data set, or its tar or Parquet files")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "huggingface"
    folder = path / data.split if (path / data.split).is_dir() else path
    with os.scandir(folder) as entries:
        found = {"/" if entry.is_dir() else Path(entry.name).suffix for entry in entries if entry.name[0] != "."}
    kinds = [kind for suffix, kind in suffixes.items() if suffix in found and ("/" not in found or kind == data.name)]
    return kinds[0] if kinds else "captions" if has_captions(folder) else "folder"
