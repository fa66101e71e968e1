"""How far this process is within a long piece of work, for whoever shows it.

The numbers are the host's, so that counting never waits for a GPU: they say what has been handed to it. Imports
nothing, so that any part of the project can count.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_counts: tuple[tuple[str, int, int], ...] = ()  # replaced as a whole: another thread reads it


def counted(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yields the items; meanwhile `position()` tells which of them is at hand. Loops inside of loops add up."""
    global _counts
    outer = _counts
    try:
        for number, item in enumerate(items, 1):
            _counts = (*outer, (what, number, len(items)))
            yield item
    finally:
        _counts = outer


def position() -> str:
    """`part 2 of 4, code 120 of 576`; empty outside of such loops. A loop of one item is not told."""
    return ", ".join(f"{what} {number} of {total}" for what, number, total in _counts if total > 1)
