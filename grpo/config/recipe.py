"""What all recipes share: their base class, the checks of several jobs, and how two of them differ.

A recipe object is always valid: every key by its section, every combination by the checks of its job. A check gives a
line for all that it finds, so that a user mends a recipe once. The line names every key that takes part as
`section.key`; the loader tells by them where the mistake was made.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, model_validator

from grpo.config.sections import Data, FreeSection, MayChange, Model, Section, Tokenizer

ORDER = (
    "convert", "model", "tokenizer", "tokenizer_loss", "classifier", "sampling", "output", "data", "evaluation",
    "rollout", "reward", "objective", "optimizer", "training", "parallel", "compile", "activation_checkpoint",
    "checkpoint", "metrics", "debug",
)  # fmt: skip
"""Sections in the order in which a reader wants them, whichever class declares them."""


class Recipe(BaseModel):
    """Base of all recipes; every field is a section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: ClassVar[str]
    """Word of the job on the command line, and the value of the key `job` in its file."""

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Name and class of every section, in the order of the file."""
        return {name: cls.model_fields[name].annotation for name in sorted(cls.model_fields, key=ORDER.index)}

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("; ".join(problems))
        return self

    def problems(self) -> Iterator[str]:
        """A line for every impossible combination of keys; none for a valid recipe."""
        yield from ()

    def notes(self) -> list[str]:
        """One line for each setting that has no effect next to the others."""
        changed = _changed_keys(type(self).model_construct(), self)
        idle = [(key, reason) for is_idle, keys, reason in self._idle_keys() if is_idle for key in keys.split()]
        return [f"{key} has no effect: {reason}" for key, reason in idle if key in changed]

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        """Whether it is so, the keys that then have no effect, and why."""
        return []

    def to_toml(self) -> str:
        """The resolved recipe, to be loaded again as it is: every key but those that are none, which TOML lacks."""
        return tomli_w.dumps({"job": self.job, **self._values(exclude_none=True)})

    def _values(self, **options: Any) -> dict[str, Any]:
        """The recipe as a file has it."""
        values = self.model_dump(**options)
        return {name: values[name] for name in self.sections()}


def required(name: str, section: Section, *keys: str) -> Iterator[str]:
    """Optional keys that a job cannot do without."""
    yield from (f"{name}.{key} is required" for key in keys if getattr(section, key) is None)


def model_problems(model: Model) -> Iterator[str]:
    """Text-conditional models, with many condition tokens, are another family."""
    if model.cls_token_num != 1:
        yield "model.cls_token_num must be 1: models here are class-conditional"


def data_problems(data: Data) -> Iterator[str]:
    """A data set needs a path unless it comes with the project."""
    if data.path is None and data.name not in ("digits", "synthetic"):
        yield f'data.path is required with data.name = "{data.name}"'


def image_size_problems(key: str, image_size: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Images are cut into whole codes."""
    if image_size % tokenizer.downsample_size:
        yield f"{key} = {image_size} must be a multiple of tokenizer.downsample_size = {tokenizer.downsample_size}"


def differences(before: Recipe, after: Recipe) -> list[str]:
    """One line for each key whose value is not the same, for two recipes of the same job."""
    return list(_changed_keys(before, after).values())


def changes_that_matter(before: Recipe, after: Recipe) -> list[str]:
    """Those of `differences` that a resumed run may not have: all but the keys that only move work around."""
    free = {
        f"{name}.{key}"
        for name, section in after.sections().items()
        for key, field in section.model_fields.items()
        if issubclass(section, FreeSection) or MayChange in field.metadata
    }
    return [line for key, line in _changed_keys(before, after).items() if key not in free]


def _changed_keys(before: Recipe, after: Recipe) -> dict[str, str]:
    old, new = _flatten(before._values()), _flatten(after._values())
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Value of every `section.key` and `reward.NAME.key`."""
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
