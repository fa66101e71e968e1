"""Pages as a browser shows them."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")

LOOK = """
const all = [...page.querySelectorAll("body *")];
const shown = all.filter((element) => element.getClientRects().length);
const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
const texts = shown.filter(hasText);
const sizes = texts.filter((element) => !["SCRIPT", "STYLE"].includes(element.tagName)).map((element) =>
  parseFloat(frame.contentWindow.getComputedStyle(element).fontSize));
return {
  widths: [page.documentElement.scrollWidth, page.documentElement.clientWidth],
  height: page.documentElement.scrollHeight,
  smallest: Math.min(...sizes),
  broken: [...page.images].filter((image) => !image.naturalWidth).map((image) => image.alt),
  images: page.images.length,
  ground: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  lines: page.querySelectorAll("path.mean[d]").length - page.querySelectorAll(".legend path.mean").length,
  hints: [...page.querySelectorAll(".hint:not([hidden])")].filter((element) => element.getClientRects().length).length,
  found: (() => { %s })(),
};
"""


def look(page: Path, *, width: int, dark: bool = False, unfold: bool = True, script: str = "return null;") -> dict:
    """What a browser makes of a page in a window of this width: sizes, images, and what `script` returns.

    Fails where the page's own script does, or where it asks for what its policy forbids.
    """
    frame = page.with_name("frame.html")
    unfolding = "page.querySelectorAll('details').forEach((part) => (part.open = true));" if unfold else ""
    frame.write_text(
        f'<meta name="color-scheme" content="light dark"><iframe src="{page.name}" width="{width}" height="800" '
        "style='border:0'></iframe><pre>-</pre><script>onload = () => { const frame = document.querySelector('iframe');"
        f"const page = frame.contentDocument; {unfolding} const look = () => {{ {LOOK % script} }};"
        "const drawn = () => [...page.querySelectorAll('.plot')].every((plot) => plot.firstChild || !plot.clientWidth);"
        "const wait = (left) => { if (left && !drawn()) return setTimeout(() => wait(left - 1), 50);"
        "setTimeout(() => document.querySelector('pre').textContent = JSON.stringify(look()), 200); };"
        "wait(400); };</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=40000", f"--user-data-dir={page.parent / 'profile'}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = ["chromium", *flags, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    seen = re.search(r"<pre>(\{.*\})</pre>", done.stdout, re.DOTALL)
    assert seen, done.stdout[-500:]
    return json.loads(unescape(seen[1]))
