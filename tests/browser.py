"""Pages as a headless Chromium shows them, which is told what to do over its debugging protocol."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
)

DRAWN = """
[...document.querySelectorAll(".plot")].every((plot) => plot.firstChild || !plot.clientWidth)
&& [...document.images].every((image) => image.complete)
"""

LOOK = """
(() => {
  const shown = [...document.querySelectorAll("body *")].filter((element) => element.getClientRects().length);
  const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const texts = shown.filter((element) => hasText(element) && !["SCRIPT", "STYLE"].includes(element.tagName));
  return {
    widths: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
    height: document.documentElement.scrollHeight,
    smallest: Math.min(...texts.map((element) => parseFloat(getComputedStyle(element).fontSize))),
    broken: [...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt),
    images: document.images.length,
    ground: getComputedStyle(document.body).backgroundColor,
    lines: document.querySelectorAll("path.mean[d]").length - document.querySelectorAll(".legend path.mean").length,
    hints: [...document.querySelectorAll(".hint:not([hidden])")].filter((hint) => hint.getClientRects().length).length,
  };
})()
"""


class Page:
    """One tab. `requests`: addresses that it has asked for. `errors`: what failed in its scripts or was refused."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """The answer to a command; what happens meanwhile is written down."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            match message:
                case {"method": "Network.requestWillBeSent", "params": {"request": {"url": address}}}:
                    self.requests.append(address)
                case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                    self.errors.append(str(details.get("exception", {}).get("description") or details.get("text")))
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error", "text": text}}}:
                    self.errors.append(text)

    def open(self, address: str, *, width: int, height: int = 1000, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, *, seconds: float = 60) -> Any:
        """Its value as soon as that is true."""
        end = time.monotonic() + seconds
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"never true: {expression}; errors {self.errors}"
            time.sleep(0.2)
        return value

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in this folder, and ends with the block."""
    from websockets.sync.client import connect

    process = subprocess.Popen(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        file, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not file.is_file() or "\n" not in file.read_text():
            assert time.monotonic() < end, "the browser did not start"
            time.sleep(0.2)
        with urlopen(f"http://127.0.0.1:{file.read_text().split()[0]}/json/list") as answer:
            target = next(entry for entry in json.load(answer) if entry["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=2**26) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=20)


def look(file: Path, *, width: int, dark: bool = False, script: str = "null") -> dict[str, Any]:
    """What a browser makes of an unfolded page in a window of this width: sizes, images; `found`: what `script` gives.

    Fails where the page's own script does, or where it asks for what its policy forbids.
    """
    with chromium(file.parent / "profile") as page:
        page.open(file.as_uri(), width=width, dark=dark)
        page.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")
        page.ask("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        page.wait_for(DRAWN)
        # The hints of what is wider than its box come after a frame.
        page.call(
            "Runtime.evaluate",
            expression="new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))",
            awaitPromise=True,
        )
        seen = {**page.ask(LOOK), "found": page.ask(script)}
        assert not page.errors, page.errors
        return seen
