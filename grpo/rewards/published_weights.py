"""Weights of networks that others have published: in, by name, strictly."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from grpo.config import UserError
from grpo.formats import read_weights, require_finite


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix of distributed training and without old tables of positions.

    Raises a UserError: no such file, or not weights.
    """
    weights = {name: value for name, value in read_weights(path).items() if not name.endswith(".position_ids")}
    return under(weights, "module.") if all(name.startswith("module.") for name in weights) else weights


@contextmanager
def sizes_of(path: str | Path, *, what: str) -> Iterator[None]:
    """Around building a network by the sizes that a file says: whatever the libraries raise is the file's mistake.

    Raises a UserError for any exception that is none: the file does not hold `what`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        problem = f"{reason} is missing" if isinstance(error, KeyError) else f"its sizes do not fit together ({reason})"
        raise UserError(f"{path} does not hold {what}: {problem}") from error


def load_strictly(network: nn.Module, weights: dict[str, Tensor], path: str | Path, *, what: str) -> None:
    """Weights into the network, every name once.

    Raises a UserError: names or shapes differ, or a number is not finite.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n")[2].split())[:200]
        raise UserError(f"{path} does not hold {what}: {reason}") from error
    require_finite(path, weights)


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose name begins with the prefix, which is cut off."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def numbered(weights: dict[str, Tensor], name: str) -> list[dict[str, Tensor]]:
    """The weights under `name.0.`, `name.1.` and so on."""
    numbers = {int(found[1]) for key in weights if (found := re.match(rf"{re.escape(name)}\.(\d+)\.", key))}
    return [under(weights, f"{name}.{number}.") for number in sorted(numbers)]
