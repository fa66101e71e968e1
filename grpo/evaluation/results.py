"""Result files of `grpo evaluate`: what their numbers depend on, and whether several may stand side by side."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo.config import UserError, printable, read_text, reading

LARGEST_RESULT = 2**24  # bytes
_FREE = (
    "metrics", "date", "versions", "hardware", "processes", "protocol", "images.source", "images.sampler.batch_size",
    "images.sampler.kernels",
)  # fmt: skip
"""What may differ between results that are compared: what was measured, when and on what."""


class Result(NamedTuple):
    """One result file.

    name       how it is called beside others
    metrics    judge -> metric -> value; None stands for no number, and for one that is not finite
    settings   section.key -> value of everything that its metrics depend on, apart from what was measured
    about      the whole file
    """

    name: str
    metrics: dict[str, dict[str, float | None]]
    settings: dict[str, Any]
    about: dict[str, Any]


def read_result(path: str | Path, *, name: str = "") -> Result:
    """A result file. Raises a UserError if it is not one that `grpo evaluate` has written."""
    with reading(f"{path} is not a result file of grpo evaluate"):
        about = json.loads(read_text(Path(path), largest=LARGEST_RESULT))
        if not isinstance(about, dict) or not {"metrics", "images", "reference", "judges", "settings"} <= about.keys():
            raise ValueError("it lacks metrics, images, reference, judges or settings")
        if not isinstance(about["images"], dict):
            raise ValueError("images is no table")
        metrics = {
            printable(judge): {printable(metric): _number(value) for metric, value in part.items()}
            for judge, part in about["metrics"].items()
        }
        settings = dict(_settings(about))
    return Result(name or str(path), metrics, settings, about)


def _number(value: Any) -> float | None:
    """Raises a ValueError, or an OverflowError, for what is none."""
    if not (value is None or isinstance(value, int | float)):
        raise ValueError("a metric is no number")
    return value if value is not None and math.isfinite(value) else None


def unequal_settings(results: Sequence[Result], *, allowed: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Key -> its value in each result, of the settings that are not the same in all; "-" where a result has none.

    Args:
        allowed: keys that may differ, or beginnings of keys before a dot.
    """
    keys = dict.fromkeys(key for result in results for key in result.settings)
    found = {key: [result.settings.get(key, "-") for result in results] for key in keys if not _within(key, allowed)}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def require_comparable(results: Sequence[Result], *, allowed: Sequence[str] = ()) -> None:
    """Raise a UserError, with a line for each setting, where results were not measured alike."""
    unequal = unequal_settings(results, allowed=allowed)
    if unequal:
        lines = [f"{key}: {', '.join(map(shown, values))}" for key, values in unequal.items()]
        remedy = "measure them alike, or name what may differ: --allow " + ",".join(unequal)
        raise UserError([f"{results[0].name} and others were not measured alike; {remedy}", *lines])


def shown(value: Any) -> str:
    """A setting in a few words."""
    if isinstance(value, list) and len(value) > 4 and all(isinstance(item, int) for item in value):
        return f"{min(value)}..{max(value)} of each of {len(value)}"
    return printable(str(value))


def _settings(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its full name; where a file's checksum is known, its path says nothing."""
    for key, value in about.items():
        name = printable(f"{prefix}{key}")
        if _within(name, _FREE) or (key == "path" and "sha256" in about):
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{name}.")
        else:
            yield name, value


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
