"""File systems that are full or read-only: the run says so, keeps what it has, and goes on when there is room."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.runs import assert_same_run, run, starts

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@contextmanager
def mounted(folder: Path, options: str):
    """A file system in memory, for as long as the block lasts."""
    folder.mkdir()
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {result.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(autouse=True)
def _mount_exists():
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system takes root and mount(8)")


def test_full_disk(tmp_path, quiet):
    folder, disk = tmp_path / "run", tmp_path / "disk"
    size = sum(path.stat().st_size for path in (quiet / "checkpoints/step-000003").iterdir())
    where = ("--checkpoint.dir", disk / "checkpoints")
    with mounted(disk, f"size={int(2.5 * size)}"):
        result = run(folder, *where)
        assert result.returncode == 1
        line = "The checkpoint of step 9 could not be written"
        assert [text[: len(line)] for text in result.stderr.splitlines()].count(line) == 1
        assert "free space there or choose another checkpoint.dir" in result.stderr
        assert 'disturbed_recipe.py", line' not in result.stderr  # no traceback of ours
        assert "GiB are free in" in result.stderr  # before anything was written
        names = {path.name for path in (disk / "checkpoints").iterdir()}
        assert names == {"step-000003", "step-000006", ".lock"}

        subprocess.run(["mount", "-o", f"remount,size={10 * size}", disk], check=True)
        result = run(folder, *where)
        assert result.returncode == 0, result.stderr
        assert starts(folder) == [0, 6]
        shutil.copytree(disk / "checkpoints", folder / "checkpoints")
    assert_same_run(folder, quiet)


def test_full_disk_under_the_metrics(tmp_path):
    folder = tmp_path / "run"
    with mounted(folder, "size=24k"):
        result = run(folder, "--checkpoint.dir", tmp_path / "checkpoints", ranks=1)
        assert result.returncode == 2, result.stderr
        assert "could not write a file of the run (No space left on device)" in result.stderr
        assert "Traceback" not in result.stderr


def test_read_only_folder(tmp_path):
    with mounted(tmp_path / "disk", "ro,size=1m"):
        result = run(tmp_path / "run", "--checkpoint.dir", tmp_path / "disk" / "checkpoints", ranks=1)
        assert result.returncode == 2
        (line,) = [text for text in result.stderr.splitlines() if "Read-only file system" in text]
        assert line.startswith("checkpoints cannot be written to")
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # before any work was done
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["faults"] == []
