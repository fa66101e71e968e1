"""What is known about every key of a recipe, in words: for the help, the documentation and the error lines."""

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from grpo.config.recipes import Recipe
from grpo.config.sections import LARGEST_INT, LARGEST_SEED

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
UNNAMED_BOUNDS = (Le(LARGEST_INT), Le(LARGEST_SEED))  # of no interest until someone exceeds them
BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


@dataclass(frozen=True)
class Key:
    """One `section.key`.

    Args:
        name: `section.key`.
        allowed: the values it takes, in words that follow "must be".
        default: its default as a recipe file writes it, or none.
        meaning: its documentation, on one line.
        is_switch: true or false.
        is_optional: may be none.
    """

    name: str
    allowed: str
    default: str
    meaning: str
    is_switch: bool
    is_optional: bool

    @property
    def section(self) -> str:
        """Name of its section."""
        return self.name.partition(".")[0]


def recipe_keys(recipe_class: type[Recipe]) -> dict[str, Key]:
    """Every key of a recipe by its name, in the order of the file."""
    return {
        key.name: key
        for section_name, section in recipe_class.sections().items()
        for key in (_describe(f"{section_name}.{name}", field) for name, field in section.model_fields.items())
    }


def toml_value(value: object) -> str:
    """The value as a recipe file writes it."""
    return "none" if value is None else tomli_w.dumps({"key": value}).removeprefix("key = ").rstrip()


def _describe(name: str, field: FieldInfo) -> Key:
    return Key(
        name=name,
        allowed=_allowed(field.annotation, tuple(field.metadata)),
        default=toml_value(field.default),
        meaning=" ".join(field.description.split()),
        is_switch=field.annotation is bool,
        is_optional=NoneType in get_args(field.annotation),
    )


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
    if annotation is NoneType:
        return "none"
    bounds = [BOUNDS[type(item)] + (item,) for item in metadata if type(item) in BOUNDS and item not in UNNAMED_BOUNDS]
    limits = " and ".join(f"{sign} {getattr(item, name)}" for name, sign, item in bounds)
    return f"{SCALARS[annotation]} {limits}".rstrip()
