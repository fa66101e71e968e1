"""The types of keys, and the base of all sections."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat

LARGEST_INT = 2**31 - 1  # beyond it counts and sizes overflow somewhere below, in an error that names no key
LARGEST_SEED = 2**63 - 1
LARGEST_FLOAT = 1e32  # beyond, products overflow in fp32
LARGEST_FACTOR = 1e3  # of learning rates and guidance: no model survives more
LARGEST_SIZE = 2**20  # of a part of a model: beyond, it would be reported as memory that ran out
LARGEST_WORKERS = 2**10
LARGEST_COUNT = 2**26  # of images that one job draws or looks at
LARGEST_IMAGE = 2**14  # pixels along a side
UNNAMED_LIMITS = (
    LARGEST_INT, LARGEST_SEED, LARGEST_FLOAT, -LARGEST_FLOAT, LARGEST_FACTOR, LARGEST_SIZE, LARGEST_WORKERS,
    LARGEST_COUNT, LARGEST_IMAGE,
)  # fmt: skip
"""Bounds that the description of a key leaves out: of no interest until someone exceeds them."""

PositiveInt = Annotated[int, Gt(0), Le(LARGEST_INT)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST_INT)]
DiscriminatorLayers = Annotated[int, Gt(0), Le(10)]  # that halve the image
DiscriminatorWidth = Annotated[int, Gt(0), Le(1024)]  # channels of the first layer
NetworkSide = Annotated[int, Gt(0), Le(4096)]  # pixels: what a network that looks at images may be given
MinusOneOrMore = Annotated[int, Ge(-1), Le(LARGEST_INT)]
Seed = Annotated[int, Ge(0), Le(LARGEST_SEED)]
Size = Annotated[int, Gt(0), Le(LARGEST_SIZE)]
ImageCount = Annotated[int, Gt(0), Le(LARGEST_COUNT)]
ImageSize = Annotated[int, Gt(0), Le(LARGEST_IMAGE)]
PositiveFloat = Annotated[FiniteFloat, Gt(0), Le(LARGEST_FLOAT)]
NonNegativeFloat = Annotated[FiniteFloat, Ge(0), Le(LARGEST_FLOAT)]
Weight = Annotated[FiniteFloat, Ge(-LARGEST_FLOAT), Le(LARGEST_FLOAT)]
LearningRate = Annotated[FiniteFloat, Ge(0), Le(LARGEST_FACTOR)]
Fraction = Annotated[float, Ge(0), Le(1)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]
Temperature = Annotated[FiniteFloat, Ge(1e-30), Le(1e30)]  # what logits can be divided by in fp32
Share = Annotated[float, Gt(0), Le(1)]
TopP = Share
GuidanceScale = Annotated[FiniteFloat, Ge(1), Le(LARGEST_FACTOR)]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
KernelBackend = Literal["auto", "triton", "reference"]
PolicyLoss = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
AdvantageKind = Literal["group_std", "group_mean", "leave_one_out", "batch_std", "gdpo"]
Normalise = Literal["none", "group", "batch"]
KLEstimator = Literal["none", "k1", "k2", "k3"]
LossLevel = Literal["token", "sequence"]


def _split_flag_text(value: object) -> object:
    """A list reaches a flag as text, `1,2,3`; a recipe file gives a list."""
    return value.split(",") if isinstance(value, str) and value != "all" else value


def _texts(value: object) -> object:
    """Class ids may stand in a file as numbers."""
    value = _split_flag_text(value)
    return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


ClassIds = Annotated[Literal["all"] | list[NonNegativeInt], BeforeValidator(_split_flag_text)]
CropRanges = Annotated[list[Annotated[FiniteFloat, Ge(1), Le(16)]], BeforeValidator(_split_flag_text), Len(1)]
LayerNames = Annotated[list[str], BeforeValidator(_split_flag_text), Len(1)]
Tags = Annotated[list[str], BeforeValidator(_split_flag_text)]
ClassNames = Annotated[Literal["all"] | list[str], BeforeValidator(_texts)]


@dataclass(frozen=True)
class Written:
    """Metadata of a key that names a file, or a folder, which a job writes."""

    folder: bool = False


class MayChange:
    """Metadata of a key that a resumed run may change: it moves work around, it does not change it."""


@dataclass(frozen=True)
class Wanted:
    """Metadata of a key that names a file or folder which must be there when a job starts."""

    what: str  # in words, with the name under which it is published


class Section(BaseModel):
    """Base of all sections: strict about names, immutable, documented by attribute docstrings; no text is empty."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, str_min_length=1)

    @classmethod
    def free_keys(cls) -> set[str]:
        """The keys that a resumed run may change."""
        is_free = issubclass(cls, FreeSection)
        return {name for name, field in cls.model_fields.items() if is_free or MayChange in field.metadata}

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        """Key, path and what is wanted there, of each file or folder that this section names and that is read."""
        for key, field in type(self).model_fields.items():
            path = getattr(self, key)
            yield from ((key, path, item) for item in field.metadata if isinstance(item, Wanted) and path is not None)

    def missing_files(self) -> Iterator[str]:
        """A line for each of `files` that is not there; it begins with the key."""
        for key, path, wanted in self.files():
            if is_url(path):
                yield f"{key}: {path} is an address: bring it to a file or folder here; wanted: {wanted.what}"
            elif not exists(path):
                yield f"{key}: {path} does not exist; wanted: {wanted.what}"


class FreeSection(Section):
    """Base of the sections whose every key a resumed run may change."""


def is_url(place: str) -> bool:
    """Whether this is an address such as s3://bucket/folder, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file or folder, which need not be there, over links of any kind."""
    try:
        if os.path.realpath(one) == os.path.realpath(other):
            return True
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or no path
        return False


VGG16 = "vgg16-397923af.pth"
"""torchvision's VGG16, which LPIPS needs, by the name of its download."""


def lpips_backbone(path: str | os.PathLike[str] | None) -> str:
    """The file of VGG16's weights: `path`, or where torch keeps its downloads (the rule of `torch.hub.get_dir`)."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.path.expanduser(os.environ.get("TORCH_HOME", f"{caches}/torch"))
    return os.path.join(home, "hub", "checkpoints", VGG16) if path is None else os.fspath(path)


def backbone_file(key: str, path: str | None) -> tuple[str, str, Wanted]:
    """That file among the `files` of a section whose `key` may name it."""
    return key, lpips_backbone(path), Wanted(f"torchvision's VGG16, {VGG16}, there, in TORCH_HOME, or by this key")


def exists(path: str) -> bool:
    """Whether there is such a file or folder; False too where the text cannot be a path."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
