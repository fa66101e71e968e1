"""The documentation as a site: built strictly and without a network, loads nothing from elsewhere, fits a phone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDE = ("index", "configuration", "scaling", "gpu_results", "coming_from", "troubleshooting", "curves", "architecture")
"""Pages with wide tables, long lines or pictures."""
OFFLINE = """
import socket, sys
def refuse(*_): raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
sys.exit(cli())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the extra [docs] is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {page.stem for page in site.glob("*.html")}
    written = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages == {"index", "contributing", "changelog", "404"} | written


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in [*site.glob("*.html"), *site.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?([^\"'> ]+)", text)
        loaded += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?([^\"'> ]+)", text)
        loaded += re.findall(r"(?:@import|url\()\s*[\"']?([^\"') ]+)", text)
        assert loaded or page.suffix == ".css"
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page.name


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra [docs] is not installed")
    for name in ("docs", ".ci", "benchmarks", "train_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "data.md").open("a") as page:
        page.write("\n[gone](nowhere.md) [away](rewards.md#nothing-of-this-name)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "nothing-of-this-name" in done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the pages with")
def test_nothing_overflows_on_a_phone(site: Path, tmp_path: Path) -> None:
    frames = "".join(f'<iframe src="{name}.html" width="390" height="800"></iframe>' for name in WIDE)
    widths_of = "f => f.contentDocument.documentElement.scrollWidth"
    page = site / "phone.html"
    page.write_text(
        f"{frames}<p>-</p><script>onload = () => {{ document.querySelector('p').textContent = "
        f"[...document.querySelectorAll('iframe')].map({widths_of}).join(' ') }}</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--allow-file-access-from-files",
        "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=200).stdout
    widths = re.findall(r"\d+", dom.partition("<p>")[2].partition("</p>")[0])
    assert len(widths) == len(WIDE), dom[-500:]
    assert {name: int(width) for name, width in zip(WIDE, widths, strict=True) if int(width) > 390} == {}
