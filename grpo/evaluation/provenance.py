"""What a metric was measured on, so that others can measure it again."""

from hashlib import file_digest
from pathlib import Path

from grpo.evaluation.distances import class_counts
from grpo.evaluation.sources import ImageSource


def describe_classes(images: ImageSource) -> dict[str, object]:
    """Number of images, and of each class where the classes are known."""
    if images.class_ids is None:
        return {"count": len(images), "class_counts": None}
    return {"count": len(images), "class_counts": class_counts(images.class_ids)}


def fingerprint(path: str) -> dict[str, str]:
    """A file's path and SHA-256, by which others can tell whether theirs is the same; of a folder the path alone."""
    if Path(path).is_dir():
        return {"path": path}
    with open(path, "rb") as file:
        return {"path": path, "sha256": file_digest(file, "sha256").hexdigest()}
