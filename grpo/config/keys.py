"""What is known about every key of a recipe, in words: for the help, the documentation and the error lines."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from grpo.config.types import UNNAMED_LIMITS, Section

SCALARS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "none", Any: "anything"
}  # fmt: skip
BOUNDS = {Gt: ">", Ge: ">=", Lt: "<", Le: "<="}


@dataclass(frozen=True)
class Key:
    """One `section.key`; the section of a reward's table is reward.NAME. A path is relative to the recipe's file."""

    section: str
    name: str
    field: FieldInfo
    is_path: bool

    def __str__(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def allowed(self) -> str:
        """The values it takes, in words that follow "must be"."""
        return _allowed(self.field.annotation, tuple(self.field.metadata))

    @property
    def default(self) -> str:
        """Its default as a recipe file writes it, or none, or the empty text where a value is required."""
        return "" if self.field.is_required() else _toml(self.field.get_default(call_default_factory=True))

    @property
    def meaning(self) -> str:
        """Its documentation, on one line."""
        return " ".join((self.field.description or "").split())

    @property
    def is_optional(self) -> bool:
        """Whether it may be none."""
        return NoneType in get_args(self.field.annotation)

    @property
    def is_table(self) -> bool:
        """Whether its value is a table of free keys, [reward.NAME.key]."""
        return get_origin(self.field.annotation) is dict

    @property
    def takes_list(self) -> bool:
        """Whether a value may be a list, which a flag gives with commas."""
        return _has_list(self.field.annotation)

    def convert(self, value: Any, *, is_text: bool) -> Any:
        """The value in the type of the key. Flags are text; a recipe file has types, which must be right.

        Raises:
            ValidationError: it is not allowed.
        """
        config = ConfigDict(str_min_length=Section.model_config["str_min_length"])
        kind: Any = Annotated[self.field.annotation, self.field]
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=config)
        return adapter.validate_strings(value) if is_text else adapter.validate_python(value, strict=True)


def section_keys(sections: Mapping[str, type[Section]]) -> dict[str, Key]:
    """Every key of these sections by its full name."""
    return {
        f"{title}.{name}": Key(title, name, field, name in getattr(section, "path_keys", ()))
        for title, section in sections.items()
        for name, field in section.model_fields.items()
    }


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return "none" if value is None else tomli_w.dumps({"key": value}).removeprefix("key = ").rstrip()


def _allowed(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], arguments[1:])
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_allowed(choice) for choice in arguments)
    if origin is list:
        return f"a list, each {_allowed(arguments[0])}"
    if origin is dict:
        return "a table"
    bounds = [item for item in metadata if type(item) in BOUNDS and _limit(item) not in UNNAMED_LIMITS]
    limits = [f"{BOUNDS[type(item)]} {_limit(item)}" for item in bounds]
    return f"{SCALARS[annotation]} {' and '.join(limits)}".rstrip()


def _has_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_has_list, get_args(annotation)))


def _limit(bound: Ge | Gt | Le | Lt) -> float:
    return getattr(bound, type(bound).__name__.lower())  # as in Gt(gt=0)
