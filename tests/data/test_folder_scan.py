"""What a scan of a folder finds, what it reads again, and that only rank 0 looks."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from grpo.config import UserError
from grpo.data import build_dataset, image_files
from grpo.data.folder_scan import remembered_scan, scan_folder
from tests.parallel.torchrun import run_two_ranks

LONG_AGO = 1_500_000_000


def settle(root: Path) -> None:
    """As if nothing under the folder had changed for years."""
    for folder, *_ in os.walk(root):
        os.utime(folder, (LONG_AGO, LONG_AGO))


@pytest.fixture
def many(tmp_path):
    """20,000 empty files in 50 folders."""
    root = tmp_path / "many"
    for number in range(50):
        folder = root / f"class{number:02d}"
        folder.mkdir(parents=True)
        for image in range(400):
            os.close(os.open(folder / f"{image:04d}.jpg", os.O_CREAT))
    settle(root)
    return root


@pytest.fixture
def calls(monkeypatch):
    """How often folders are listed and looked at; the file of the index is not counted."""
    counts = Counter()

    def count(name):
        call = getattr(os, name)

        def counted(*arguments, **keywords):
            counts[name] += not str(arguments[0]).endswith(".npz")
            return call(*arguments, **keywords)

        monkeypatch.setattr(f"grpo.data.folder_scan.os.{name}", counted)

    count("scandir")
    count("stat")
    return counts


def test_second_start_reads_no_folder_that_has_not_changed(many, tmp_path, calls):
    index = tmp_path / "index.npz"
    first = remembered_scan(many, index, suffixes=(".jpg",))
    assert sum(len(listing.files) for listing in first.values()) == 20_000
    assert calls == {"scandir": 51, "stat": 51}
    calls.clear()
    assert remembered_scan(many, index, suffixes=(".jpg",)) == first
    assert calls == {"stat": 51}
    (many / "class07" / "new.jpg").write_bytes(b"12345")
    calls.clear()
    again = remembered_scan(many, index, suffixes=(".jpg",))
    assert calls == {"stat": 51, "scandir": 1}
    assert again["class07"].files == [*first["class07"].files, "new.jpg"]
    assert again["class07"].sizes[-1] == 5
    assert again["class08"] == first["class08"]


def test_folders_that_come_and_go_are_noticed(many, tmp_path):
    index = tmp_path / "index.npz"
    remembered_scan(many, index, suffixes=(".jpg",))
    (many / "class03").rename(tmp_path / "elsewhere")
    (many / "abc" / "deep").mkdir(parents=True)
    (many / "abc" / "deep" / "a.jpg").touch()
    names = [f"class{number:02d}" for number in range(50) if number != 3]
    listings = remembered_scan(many, index, suffixes=(".jpg",))
    assert listings[""].folders == ["abc", *names]
    assert listings["abc/deep"].files == ["a.jpg"]
    assert "class03" not in listings


def test_what_changed_just_now_is_not_relied_upon(tmp_path, calls):
    """A file may be added within one tick of the file system's clock."""
    (tmp_path / "data").mkdir()
    index = tmp_path / "index.npz"
    remembered_scan(tmp_path / "data", index, suffixes=(".jpg",))
    remembered_scan(tmp_path / "data", index, suffixes=(".jpg",))
    assert calls["scandir"] == 2


@pytest.mark.parametrize("names", ["../../a.jpg", "a.jpg\0b.jpg\0c.jpg"])
def test_damaged_index_is_made_anew(many, tmp_path, names, calls):
    index = tmp_path / "index.npz"
    first = remembered_scan(many, index, suffixes=(".jpg",))
    with np.load(index) as arrays:
        changed = dict(arrays) | {"names": np.frombuffer(names.encode(), dtype=np.uint8)}
    for content in (lambda: np.savez(index, **changed), lambda: index.write_bytes(b"PK\3\4nothing")):
        content()
        calls.clear()
        assert remembered_scan(many, index, suffixes=(".jpg",)) == first
        assert calls["scandir"] == 51


def test_loops_pipes_and_hidden_things_are_left_out(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "self").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "other").symlink_to(tmp_path / "a")
    (tmp_path / ".hidden").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    for name in ("a/1.png", "a/b/2.png", "a/._1.png", ".hidden/3.png", "a/notes.txt"):
        (tmp_path / name).touch()
    found = [os.path.relpath(file, tmp_path) for file in image_files(tmp_path)]
    assert found == ["a/1.png", "a/gone.png", "a/b/2.png", "other/1.png", "other/gone.png", "other/b/2.png"]
    assert scan_folder(tmp_path, suffixes=(".png",))["a"].sizes == [0, -1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="locked cannot be read: Permission denied"):
        scan_folder(tmp_path, suffixes=(".png",))


def test_index_is_beside_the_data_or_where_the_recipe_says(class_folders, section, tmp_path, monkeypatch):
    path = class_folders(["a", "b"], 2)
    build_dataset(section(path, index_cache="none"), num_classes=2)
    assert not (path / ".grpo-cache").exists()
    expected = build_dataset(section(path), num_classes=2)
    assert len(list((path / ".grpo-cache").glob("folder-*.npz"))) == 1
    assert expected.class_names == ["a", "b"]
    build_dataset(section(path, index_cache=str(tmp_path / "kept")), num_classes=2)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("grpo.data.index_cache.FOLDER", "a/000.png/x")  # cannot be made: a file is in the way
    again = build_dataset(section(path), num_classes=2)
    assert len(list((tmp_path / "xdg" / "grpo").iterdir())) == 1
    assert [again.describe(i) for i in range(4)] == [expected.describe(i) for i in range(4)]


def test_rank_0_looks_for_all_and_its_mistake_is_everyones(class_folders, tars, section, tmp_path):
    folder, empty = class_folders(["a", "b"], 3), tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    (tars() / "images-train-001.tar").write_bytes(b"no tar")
    result = run_two_ranks("tests/data/two_ranks.py", tmp_path, folder, empty, tmp_path / "tars")
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    expected = build_dataset(section(folder), num_classes=3).fingerprint["files"]
    assert first[0] == [6, expected, 2]
    assert second[0] == [6, expected, 0]
    assert "has 1 folders but no images in them" in first[1][0]
    assert "images-train-001.tar is not a tar file" in first[2][0]
    assert [found for found, *_ in second[1:]] == [found for found, *_ in first[1:]]
