"""What changes a data set's fingerprint, and what does not."""

import shutil

import numpy as np
import pytest

from grpo.data import build_dataset


@pytest.fixture
def folder(class_folders):
    return class_folders(["b", "c"], 3)


def parts(path, section, **keys):
    return build_dataset(section(path, **keys), num_classes=4).fingerprint


def test_moved_data_keeps_its_fingerprint(folder, section, tmp_path):
    before = parts(folder, section)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert parts(tmp_path / "elsewhere", section) == before == parts(folder, section)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        (lambda path: (path / "b" / "000.png").unlink(), {"files", "labels"}),
        (lambda path: shutil.copytree(path / "b", path / "a"), {"files", "labels"}),
        (lambda path: (path / "c").rename(path / "d"), {"files", "labels"}),
        (lambda path: (path / "b" / "000.png").rename(path / "b" / "9.png"), {"files"}),
        (lambda path: (path / "b" / "000.png").write_bytes(b"1234"), {"files"}),
    ],
    ids=["removed", "class in front", "class renamed", "renamed", "another size"],
)
def test_changed_data_has_another(folder, section, change, different):
    before = parts(folder, section)
    change(folder)
    after = parts(folder, section)
    assert {key for key in before if before[key] != after[key]} == different


def test_image_size_is_a_part_and_the_model_is_not(folder, section):
    before = parts(folder, section)
    assert {key for key, value in parts(folder, section, image_size=8).items() if value != before[key]} == {
        "image_size"
    }
    (folder / "map.txt").write_text("b 3\nc 1\n")
    mapped = build_dataset(section(folder, class_map=str(folder / "map.txt")), num_classes=4)
    assert mapped.class_ids.tolist() == [3, 3, 3, 1, 1, 1]
    assert mapped.fingerprint == before


def test_every_source_has_one(section, saved_dataset, make_images):
    saved = saved_dataset({"image": make_images(3), "label": [0, 1, 0]})
    data = [section(saved), section(name="digits"), section(name="digits", split="test"), section(name="synthetic")]
    fingerprints = [build_dataset(one, num_classes=10).fingerprint for one in data]
    assert len({part["files"] for part in fingerprints}) == 4
    assert build_dataset(data[0], num_classes=2).fingerprint == fingerprints[0]
    assert all(isinstance(value, str | int) for part in fingerprints for value in part.values())
    assert np.all([len(part["files"]) == 64 for part in fingerprints])
