"""Tables as lines of text for a terminal of some width."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len

from grpo.config import printable
from grpo.observe.tables import Table

GAP = 2  # letters between columns
LEAST_LABEL = 12  # letters that a label is wrapped to


class Line(NamedTuple):
    """A label and the texts after it, one a column."""

    label: str
    cells: list[str]


def table_lines(table: Table, width: int) -> Iterator[str]:
    """The table in at most `width` letters, as far as that goes without cutting a word in two.

    Columns stay columns where they fit, if need be beside labels on several lines. Otherwise rows and columns change
    places, a few rows at a time. A row that is too wide either way, such as one of long paths, is a list, one line for
    each column.
    """
    columns = [printable(column) for column in table.columns]
    rows = [Line(printable(label), [printable(str(cell)) for cell in cells]) for label, cells in table.rows]
    title, note = printable(table.title), printable(table.note)
    if not rows:
        yield f"{title}: nothing. {note}".rstrip()
        return
    if title:
        yield title
    fitting, wide = _upright(columns, rows, width)
    if len(fitting) >= len(wide):
        yield from _grid(columns, fitting, width)
    else:
        parts, wide = _turned(columns, rows, width)
        for number, part in enumerate(parts):
            if number:
                yield ""
            turned = [Line(name, [row.cells[place] for row in part]) for place, name in enumerate(columns)]
            yield from _grid([row.label for row in part], turned, width)
    names = _width(columns)
    for row in wide:
        yield ""
        yield f"  {row.label}"
        yield from (f"    {_left(name, names)}{' ' * GAP}{cell}" for name, cell in zip(columns, row.cells, strict=True))
    if note:
        yield from ["", *textwrap.wrap(note, width, initial_indent="  ", subsequent_indent="  ")]


def _upright(columns: Sequence[str], rows: Sequence[Line], width: int) -> tuple[list[Line], list[Line]]:
    """The rows that fit under the columns together, the narrowest first into the choice; and the others."""
    words = (cell_len(word) for row in rows for word in row.label.split())
    if _label_room(columns, rows, width) >= max([LEAST_LABEL, *words]):
        return [*rows], []
    needs = [cell_len(row.label) + sum(map(cell_len, row.cells)) for row in rows]
    labels, widths, chosen = 0, [*map(cell_len, columns)], set()
    for number in sorted(range(len(rows)), key=needs.__getitem__):
        labels = max(labels, cell_len(rows[number].label))
        widths = [max(known, cell_len(cell)) for known, cell in zip(widths, rows[number].cells, strict=True)]
        if GAP + labels + sum(GAP + column for column in widths) > width:
            break
        chosen.add(number)
    fitting = [row for number, row in enumerate(rows) if number in chosen]
    return fitting, [row for number, row in enumerate(rows) if number not in chosen]


def _turned(columns: Sequence[str], rows: Sequence[Line], width: int) -> tuple[list[list[Line]], list[Line]]:
    """Rows that fit beside each other, after the names of the columns; and those that do not fit even alone."""
    parts: list[list[Line]] = []
    wide: list[Line] = []
    names = GAP + _width(columns)
    left = 0
    for row in rows:
        need = GAP + _width([row.label, *row.cells])
        if names + need > width:
            wide.append(row)
            continue
        if need > left:
            parts.append([])
            left = width - names
        parts[-1].append(row)
        left -= need
    return parts, wide


def _grid(columns: Sequence[str], rows: Sequence[Line], width: int) -> Iterator[str]:
    """Labels to the left, columns to the right."""
    if not rows:
        return
    labels = min(_width([row.label for row in rows]), _label_room(columns, rows, width))
    widths = _column_widths(columns, rows)
    for label, cells in (("", columns), *rows):
        first, *more = [label] if cell_len(label) <= labels else textwrap.wrap(label, labels, break_on_hyphens=False)
        right = (" " * (GAP + size - cell_len(cell)) + cell for size, cell in zip(widths, cells, strict=True))
        yield f"  {_left(first, labels)}{''.join(right)}"
        yield from (f"  {line}" for line in more)


def _label_room(columns: Sequence[str], rows: Sequence[Line], width: int) -> int:
    """Letters that the columns leave for labels."""
    return width - GAP - sum(GAP + column for column in _column_widths(columns, rows))


def _column_widths(columns: Sequence[str], rows: Sequence[Line]) -> list[int]:
    cells = zip(columns, *(row.cells for row in rows), strict=True)
    return [_width(column) for column in cells]


def _width(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _left(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))
