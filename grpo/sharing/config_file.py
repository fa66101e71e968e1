"""config.json of a shared generator: what the weights beside it are of, and how they are drawn from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from grpo.config import DRAWN_ALIKE, Sampling, UserError, read_text, reading
from grpo.config.types import Size
from grpo.formats import saved_config
from grpo.texts import TextEncoder

CONFIG_NAME = "config.json"
FORMAT = 1  # another number where an older reader would misread what is there
LARGEST_CONFIG = 2**22  # bytes: the names of many classes


class _Part(BaseModel):
    """Base of what stands in the file: nothing but what is named here, in no other type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Network(_Part):
    """One of the two networks: the name of its class, and its sizes by their names there."""

    architecture: str
    sizes: dict[str, Any]


class TextFeatures(_Part):
    """What made the features of texts: `TextEncoder.identity`. A T5 is told by the `sha256` of its last block."""

    encoder: Literal["words", "t5"]
    width: Size
    version: int | None = None
    sha256: str | None = None
    max_tokens: Size | None = None

    def require_same(self, encoder: TextEncoder, *, where: object) -> None:
        """Raise a UserError where another encoder made the features that the generator was trained with."""
        known = {key: value for key, value in self.model_dump().items() if value is not None}
        if any(encoder.identity.get(key) != value for key, value in known.items()):
            raise UserError(f"{where}: this is not the text encoder that the generator was trained with ({known})")


class SharedConfig(_Part):
    """The whole file. `sampling` has those of `DRAWN_ALIKE` that are not their defaults."""

    format: Literal[1]
    generator: Network
    tokenizer: Network
    text: TextFeatures | None = None
    sampling: dict[str, int | float] = {}


def describe(model: nn.Module, tokenizer: nn.Module, *, text: TextFeatures | None, sampling: Sampling) -> str:
    """The text of the file for these networks."""
    drawn = sampling.model_dump(include={*DRAWN_ALIKE}, exclude_defaults=True)
    config = {"format": FORMAT, "generator": _network(model), "tokenizer": _network(tokenizer)}
    config |= {"text": None if text is None else text.model_dump(exclude_none=True), "sampling": drawn}
    return json.dumps(config, indent=2) + "\n"


def read(folder: Path) -> SharedConfig:
    """The file of a folder. Raises a UserError: there is none, or something else than `describe` writes."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{folder} has no {CONFIG_NAME}: give a folder that `grpo share` wrote")
    with reading(f"{file} is not that of a shared generator"):
        text = read_text(file, largest=LARGEST_CONFIG)
        try:
            config = SharedConfig.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(problems(error)) from error
        if unknown := config.sampling.keys() - {*DRAWN_ALIKE}:
            raise ValueError(f"sampling.{min(unknown)}: unknown; known are {', '.join(DRAWN_ALIKE)}")
    return config


def require_sizes(model: nn.Module, network: Network, *, file: Path) -> None:
    """Raise a UserError where config.json says other sizes than the weights have, of which it is a copy."""
    own = _network(model)
    if own != network.model_dump():
        known, said = own["sizes"], network.sizes
        wrong = next((key for key in {**known, **said} if known.get(key) != said.get(key)), "architecture")
        raise UserError(
            f"{file.parent / CONFIG_NAME}: {wrong} is not that of {file.name}; take the two files from one source"
        )


def sampling_of(base: Sampling, given: Mapping[str, Any], *, where: str) -> Sampling:
    """Settings of drawing with some changed. Raises a UserError, which begins with `where`, for what cannot be."""
    try:
        return Sampling.model_validate(base.model_dump() | dict(given))
    except ValidationError as error:
        raise UserError(f"{where}{problems(error)}") from error


def problems(error: ValidationError) -> str:
    """What is wrong, key by key, in one line."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def _network(model: nn.Module) -> dict[str, Any]:
    """As the file has it: tuples are lists there."""
    return {"architecture": type(model).__name__, "sizes": json.loads(json.dumps(saved_config(model.config)))}
