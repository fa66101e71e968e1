"""From the recipe's section to a checked data set."""

from pathlib import Path

import numpy as np

from grpo.config import Data, UserError
from grpo.data.builtin import Digits, Synthetic
from grpo.data.dataset import ImageDataset
from grpo.data.folder import ImageFolder


def build_dataset(data: Data, *, num_classes: int | None) -> ImageDataset:
    """Open the data set that the section names; all labels are checked here.

    Args:
        num_classes: labels must be below it; fewer classes in the data are fine. None where labels do not matter.

    Raises:
        UserError: no such folder, not a data set, no such split or column, empty, a label out of range.
    """
    dataset = _open(data, num_classes=num_classes or 10)
    if len(dataset) == 0:
        raise UserError(f"data.path {data.path} has no images in split {data.split!r}")
    if num_classes is None:
        num_classes = max(len(dataset.class_names), int(dataset.class_ids.max()) + 1)
    elif len(outside := np.flatnonzero((dataset.class_ids < 0) | (dataset.class_ids >= num_classes))):
        others = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        raise UserError(
            f"{dataset.describe(outside[0])} has label {dataset.class_ids[outside[0]]}{others}, outside 0.."
            f"{num_classes - 1}: correct the label or set num_classes (now {num_classes}) of the recipe's [model], or "
            "[classifier], to the number of classes"
        )
    unnamed = range(len(dataset.class_names), num_classes)
    dataset.class_names = (dataset.class_names + [str(class_id) for class_id in unnamed])[:num_classes]
    return dataset


def _open(data: Data, *, num_classes: int) -> ImageDataset:
    if data.name == "digits":
        return Digits(data=data)
    if data.name == "synthetic":
        return Synthetic(data=data, num_classes=num_classes)
    if data.path is None:
        raise UserError(f"data.path is missing: data.name = {data.name!r} reads a folder")
    folder = Path(data.path)
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path {data.path} {state}: give the folder of the data set")
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if data.name == "huggingface" and not saved:
        raise UserError(
            f"data.path {data.path} was not written by save_to_disk (no dataset_dict.json or state.json): "
            "set data.name to folder if it holds class folders"
        )
    if data.name == "folder" and saved:
        raise UserError(f"data.path {data.path} is a saved Hugging Face dataset: set data.name to huggingface")
    if not saved:
        return ImageFolder(data=data)
    from grpo.data.huggingface import SavedDataset  # here, for `datasets` takes seconds

    return SavedDataset(data=data)
