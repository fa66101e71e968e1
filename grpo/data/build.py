"""From the recipe's section to a checked data set."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo.config import Data, UserError
from grpo.data.builtin import Digits, Synthetic
from grpo.data.class_ids import find_class_ids, implied_classes
from grpo.data.class_list import ClassList
from grpo.data.class_map import is_class_id, nfc, read_class_map
from grpo.data.code_list import CodeList
from grpo.data.dataset import ImageDataset
from grpo.data.folder import ImageFolder
from grpo.data.shapes import Shapes
from grpo.data.webdataset import TarDataset
from grpo.models import numbered

LARGEST_LABEL = 2**24


def build_dataset(
    data: Data, *, num_classes: int | None, learned: Sequence[str] = (), new_classes: int = 0
) -> ImageDataset:
    """Open the data set that the section names; all labels are checked, and compared with the model's classes, here.

    Args:
        num_classes: labels must be below it; fewer classes in the data are fine. None where labels do not matter.
        learned: names of the classes that the model has learned (`learned_classes`); () lets the data define the ids.
        new_classes: the last classes of the model, each of which must have images (`model.new_classes`).

    Raises:
        UserError: no such folder, not a data set, no such split or column, empty, a label out of range, a class whose
            id would be a guess (`find_class_ids`).
    """
    dataset = _open(data, num_classes=num_classes or 10, learned=learned)
    dataset.num_classes = num_classes
    if len(dataset) == 0 and not dataset.is_stream:
        raise UserError(f"data.path {data.path} has no images in split {data.split!r}")
    if dataset.class_ids.max(initial=-1) >= LARGEST_LABEL:
        index = int(dataset.class_ids.argmax())
        raise UserError(f"{dataset.describe(index)} has label {dataset.class_ids[index]}: no data set has such a class")
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


def _require_new_classes(dataset: ImageDataset, *, num_classes: int, new_classes: int) -> None:
    """Every class that a model is to learn beside those it has must have images."""
    found = set(np.unique(dataset.class_ids).tolist())
    new = range(num_classes - new_classes, num_classes)
    if without := [class_id for class_id in new if class_id not in found]:
        learned = [dataset.class_names[class_id] for class_id in sorted(found) if 0 <= class_id < new.start]
        known = f" (of the model's classes they have {', '.join(map(repr, learned[:4]))})" if learned else ""
        names = [dataset.class_names[class_id] for class_id in without]
        named = ", ".join(repr(name) for name in names if not name.isdecimal())
        raise UserError(
            f"the data have images of {new_classes - len(without)} new classes{f', none of {named}' if named else ''}"
            f"{known}, and model.new_classes = {new_classes}: add images, lower model.new_classes and "
            f"model.num_classes by {len(without)}, or say in data.class_map which class is which"
        )


def _open(data: Data, *, num_classes: int, learned: Sequence[str]) -> ImageDataset:
    if data.name == "classes":
        return ClassList(data=data, num_classes=num_classes, learned=learned)
    if data.name == "digits":
        return Digits(data=data)
    if data.name == "synthetic":
        return Synthetic(data=data, num_classes=num_classes)
    if data.name == "shapes":
        return Shapes(data=data)
    if data.path is None:
        raise UserError(f"data.path is missing: data.name = {data.name!r} reads a folder")
    if data.name == "codes":
        return CodeList(data=data)
    if data.name == "stream" or (data.name == "imagenet" and "://" in data.path):
        from grpo.data.streamed import StreamedDataset  # here, for `datasets` takes seconds

        return StreamedDataset(data=data)
    kind = _kind_at(Path(data.path), data)
    if data.name not in ("imagenet", kind):
        raise UserError(
            f"data.path {data.path} {_KINDS[kind]}; data.name = {data.name} is for what {_KINDS[data.name]}: set "
            f"data.name to {kind}, or correct data.path"
        )
    if kind == "folder":
        return ImageFolder(data=data)
    if kind == "webdataset":
        return TarDataset(data=data)
    if kind == "parquet":
        from grpo.data.parquet import ParquetDataset

        return ParquetDataset(data=data)
    from grpo.data.huggingface import SavedDataset

    return SavedDataset(data=data)


_KINDS = {
    "huggingface": "was written by save_to_disk (it has dataset_dict.json or state.json)",
    "webdataset": "is or holds tar files",
    "parquet": "is or holds Parquet files",
    "folder": "holds folders of images",
}


def _kind_at(path: Path, data: Data) -> str:
    """Which kind of data set in files is at `path`. Raises a UserError where there is nothing."""
    suffixes = {".tar": "webdataset", ".parquet": "parquet"}
    if not path.is_dir():
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
    return kinds[0] if kinds else "folder"
