"""Every message that docs/troubleshooting.md quotes is still one of the program's."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)


def texts() -> list[str]:
    """All texts in the code, with ... in the place of what an f-string puts in."""
    found = []
    for file in [*(ROOT / "grpo").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.fixture(scope="module")
def known() -> list[str]:
    return texts()


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_still_told(message: str, known: list[str]) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
    assert any(pattern.search(text) for text in known if len(text) < 400)


def test_there_are_enough_of_them() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) > 30
