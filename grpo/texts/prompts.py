"""Lists of prompts in files."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpo.config import UserError, read_text, reading, require_regular
from grpo.texts.features import LARGEST_TEXT, clean_text

CAPTION_KEYS = ("text", "caption", "captions", "prompt")
"""Where a text stands in an object, the first that is there."""


class Prompt(NamedTuple):
    """One text to draw, and what its file says of it."""

    text: str
    name: str  # of its file, or its number in the list
    about: Mapping[str, Any]  # the object of a .jsonl; else its text alone


def read_prompts(path: str | Path, *, key: str | None = None) -> list[Prompt]:
    """The prompts of a .txt, one a line; a .jsonl, one object a line; or a folder of .txt files, one a text.

    Blank lines are passed over. The same text may come several times.

    Args:
        key: of the objects of a .jsonl that holds the text; None is the first of `CAPTION_KEYS` that is there.

    Raises:
        UserError: no such file, a line that is no text, or no prompt at all.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt" and not file.name.startswith("."))
        found = [_of_text(_content(file), str(file), file.stem) for file in files]
    elif path.suffix == ".jsonl":
        found = [
            Prompt(text_of(entry, key, where), str(number), entry)
            for number, (where, entry) in enumerate(read_objects(path))
        ]
    elif path.suffix == ".txt":
        found = [_of_text(line, where, str(place)) for place, (where, line) in enumerate(_lines(path))]
    else:
        raise UserError(f"{path}: prompts are a .txt, a .jsonl, or a folder of .txt files")
    if not found:
        raise UserError(f"{path} has no prompts: write one a line")
    return found


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands and the object, of each line of a .jsonl. Raises a UserError for a line that is none."""
    for where, line in _lines(path):
        with reading(f"{where} is not a JSON object"):
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("each line must be one")
        yield where, entry


def text_of(entry: Mapping[str, Any], key: str | None, where: str) -> str:
    """The one text of an object. Raises a UserError: it has none."""
    found = key if key is not None else next((name for name in CAPTION_KEYS if name in entry), None)
    if found is None or found not in entry:
        raise UserError(f"{where} has no {key or ', '.join(CAPTION_KEYS)}: which key holds the text?")
    return clean_text(entry[found], where)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where it stands and the text, of each line that is not blank; the file may be larger than the memory."""
    with reading(f"{path} cannot be read"):
        require_regular(path)
        file = path.open(encoding="utf-8-sig")
    with file:
        for number in itertools.count(1):
            with reading(f"{path}:{number} cannot be read"):
                line = file.readline(LARGEST_TEXT + 1)
                if len(line) > LARGEST_TEXT:
                    raise ValueError(f"the line has more than {LARGEST_TEXT} characters")
            if not line:
                return
            if line.strip():
                yield f"{path}:{number}", line


def _content(path: Path) -> str:
    with reading(f"{path} cannot be read"):
        return read_text(path)


def _of_text(text: str, where: str, name: str) -> Prompt:
    text = clean_text(text, where)
    return Prompt(text, name, {"prompt": text})
