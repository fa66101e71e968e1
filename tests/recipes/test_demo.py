"""`grpo demo` as a reader meets it: the page in a browser, and as the library's own client asks it."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from grpo.config import UserError
from grpo.jobs import demo
from tests.browser import chromium, needs_browser
from tests.sharing.tiny import run_folder

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
BUTTON = "[...document.querySelectorAll('button')].find((button) => button.innerText.trim() == 'Draw')"
DRAWN = "[...document.querySelectorAll('.grid-wrap img')].filter((image) => image.naturalWidth >= 192).length"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page that is served to the tests of this file."""
    run = run_folder(tmp_path_factory.mktemp("demo") / "run")
    command = [sys.executable, "-m", "grpo", "demo", str(run), "--demo.port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"The page is at (http://127\.0\.0\.1:\d+) until Ctrl-C\n", line)
        assert found, line
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=30)


@needs_gradio
def test_the_page_draws_what_is_asked_for(address: str) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False, analytics_enabled=False)
    settings = [1.0, 1.0, 0, 1.0]
    images = client.predict([0, 2], 3, 0, *settings, api_name="/draw")
    assert [image["caption"] for image in images] == ["cat", "dog", "cat"]
    assert Image.open(images[0]["image"]).size == (192, 192)
    with pytest.raises(AppError, match="nothing is asked for"):
        client.predict([], 3, 0, *settings, api_name="/draw")


@needs_gradio
@needs_browser
def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    """Nothing overflows, images come back, and nothing is fetched from elsewhere."""
    with chromium(tmp_path) as page:
        for width in (1280, 390):
            page.open(address, width=width)
            page.wait_for(f"!!{BUTTON}")
            page.ask(f"{BUTTON}.click()")
            page.wait_for(f"{DRAWN} == 8")
            assert page.ask("document.documentElement.scrollWidth") == width
        assert page.errors == []
        outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        assert outside == []


def test_a_port_in_use_and_a_host_of_others(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"demo\.host = 192\.0\.2\.1"):  # of documentation: no machine's own
        demo.free_port("192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = f"demo.port = {port}: Address already in use; --demo.port 0"
        with pytest.raises(UserError, match=told):
            demo.free_port("127.0.0.1", port)
        with pytest.raises(UserError, match=r"pip install" if find_spec("gradio") is None else told):
            demo.main([str(run), "--demo.port", str(port)])
