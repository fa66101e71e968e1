"""Pages that need nothing else: one shell, style and script for all of them."""

import base64
import hashlib
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from grpo.observe.charts import ChartNumbers
from grpo.observe.files import write_atomically

TEMPLATES = "templates"


def write_page(path: Path, template: str, *, title: str, numbers: ChartNumbers, **values: Any) -> Path:
    """Render a template into a file, of which a reader never sees half. All values are escaped.

    The page loads nothing, and runs no script but its own, whose checksum it names.

    Args:
        numbers: of the curves.
        values: what the template shows.
    """
    style, script = _source("page.css"), _source("page.js")
    page = (
        _templates()
        .get_template(template)
        .render(
            title=title,
            numbers=numbers.as_json(),
            style=style,
            script=script,
            policy=f"default-src 'none'; img-src data:; style-src {_checksum(style)}; script-src {_checksum(script)}",
            written=f"{datetime.now():%Y-%m-%d %H:%M}",
            **values,
        )
    )
    # Names of files may hold bytes that are no text.
    write_atomically(path, page.encode("utf-8", errors="backslashreplace").decode())
    return path


@cache
def _templates() -> Environment:
    loader = PackageLoader("grpo.observe", TEMPLATES)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _source(name: str) -> Markup:
    return Markup((files("grpo.observe") / TEMPLATES / name).read_text(encoding="utf-8"))


def _checksum(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
