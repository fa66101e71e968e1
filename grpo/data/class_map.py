"""The file of `data.class_map`: which class of a model each class of a data set is."""

import csv
import json
import re
import unicodedata
from collections import Counter

import tomli

from grpo.config import UserError, read_text, reading, shorten


def nfc(name: str) -> str:
    """The name in Unicode's composed form: file systems differ in how they write an accent."""
    return unicodedata.normalize("NFC", name)


def is_class_id(text: str) -> bool:
    """Whether a text is a class id; names of classes are not."""
    return text.isdecimal() and len(text) <= 9


def looks_like_number(text: str) -> bool:
    """Whether a number was meant, be it a class id or not: -1, 1.0, 1e3, 99999999999."""
    return re.fullmatch(r"[+\-\u2212]?[\d.][\d.,_]*(e[+-]?\d+)?", text, re.IGNORECASE) is not None


def read_class_map(path: str) -> dict[str, str]:
    """The mapping in a file: .json or .toml with one table, else lines of two columns, as texts.

    Columns are parted by a tab, else by a comma, else by the first space; empty lines and those with # are left out. A
    column with tabs or commas may stand in double quotes, as in CSV. Names are in NFC.

    Raises:
        UserError: it cannot be read, is not such a table, or has a class twice.
    """
    where = f"data.class_map {path}"
    with reading(f"{where} cannot be read"):
        text = read_text(path)
        if path.endswith(".json"):
            pairs = json.loads(text, object_pairs_hook=list)
        elif path.endswith(".toml"):
            pairs = list(tomli.loads(text).items())
        else:
            lines = (line.strip() for line in text.splitlines())
            pairs = [_columns(line, where) for line in lines if line and not line.startswith("#")]
    is_table = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not is_table or not all(type(value) in (str, int) for _, value in pairs):
        raise UserError(f"{where} must be one table: class = id, or class = name")
    pairs = [(nfc(name), str(value)) for name, value in pairs]
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{where} has {twice!r} twice: leave one of them")
    return mapping


def _columns(line: str, where: str) -> tuple[str, str]:
    separator = next((mark for mark in "\t," if mark in line), None)
    if separator is None:
        columns = line.split(None, 1)
    else:
        columns = next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    columns = [column.strip() for column in columns]
    if len(columns) != 2 or not all(columns):
        quotes = "; put what has commas in double quotes" if len(columns) > 2 else ""
        raise UserError(f"{where}: {shorten(repr(line))} is not a class and its id or name{quotes}")
    return columns[0], columns[1]
