"""Image files and data sets made to harm: refused by name, and nothing hangs, crashes, runs or fills the memory."""

import io
import json
import os
import struct
import zlib
from contextlib import suppress

import numpy as np
import pyarrow
import pytest
from PIL import Image

from grpo.config import UserError
from grpo.data import UnreadableImage, build_dataset, image_files, read_image
from grpo.data.huggingface import check_arrow
from grpo.evaluation import open_images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) print\n%%EOF\n"


def png(width: int, height: int) -> bytes:
    """A PNG that says that it is so large, and holds a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = zlib.compress(bytes((width + 1) * height)) if width * height < 2**20 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def fifo(path):
    os.mkfifo(path)


def endless_scans(path):
    """A progressive JPEG of an hour: its last scan, 23 bytes, a hundred thousand times."""
    Image.new("L", (3000, 3000)).save(buffer := io.BytesIO(), "JPEG", progressive=True)
    content = buffer.getvalue()
    path.write_bytes(content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 100_000 + content[-2:])


HOSTILE = {
    "a side more than 100 times the other": lambda path: path.write_bytes(png(1, 65000)),
    "pixels, more than": lambda path: path.write_bytes(png(12_000, 12_000)),
    "is not an image file": lambda path: path.write_bytes(EPS),
    "a pipe or a device": fifo,
    "Is a directory": lambda path: path.mkdir(),
    "pipe or a device, not a file": lambda path: path.symlink_to("/dev/zero"),
    "progressive JPEG of 100006 scans": endless_scans,
    "pixels. exceeds limit": lambda path: path.write_bytes(png(2**17, 2**17)),
}


@pytest.fixture
def no_programs(monkeypatch):
    """Nothing may be started, such as Ghostscript for EPS."""

    def refuse(*arguments, **keys):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", refuse)


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.timeout(20)
def test_a_hostile_file_is_named_and_counted(words, class_folders, section, no_programs):
    folder = class_folders(["a"], 2)
    path = folder / "a" / "001.png"
    path.unlink()
    HOSTILE[words](path)
    dataset = build_dataset(section(folder, max_bad_images=0), num_classes=1)
    if not path.is_file():  # folders, pipes and devices are left out where files are listed, and not read if asked for
        assert len(dataset) == 1
        with pytest.raises(OSError, match=words):
            read_image(path)
        return
    with pytest.raises(UnreadableImage, match=rf"a/001\.png .*{words}") as caught:
        dataset[1]
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="max_bad_images = 0"):
        dataset.record_unreadable(1, str(caught.value))


@pytest.mark.parametrize("words", list(HOSTILE)[:3])
def test_hostile_bytes_in_a_saved_dataset_and_an_evaluation(words, saved_dataset, section, tmp_path, no_programs):
    (tmp_path / "images").mkdir()
    file = tmp_path / "images" / "x.png"
    HOSTILE[words](file)
    path = saved_dataset({"image": [file.read_bytes()], "label": [0]})
    with pytest.raises(UnreadableImage, match=words):
        build_dataset(section(path), num_classes=1)[0]
    with pytest.raises(UserError, match=rf"x\.png .*{words}"):
        open_images(file.parent)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"])
def test_damaged_bytes_of_every_format_are_an_error_of_the_file(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)).save(buffer, kind)
    assert read_image(io.BytesIO(buffer.getvalue())).size == (13, 9)
    for seed in range(200):
        random = np.random.default_rng(seed)
        damaged = bytearray(buffer.getvalue())[: random.integers(1, 2 * len(buffer.getvalue()))]
        for place in random.integers(0, len(damaged), 4):
            damaged[place] = random.integers(256)
        with suppress(OSError, ValueError):
            read_image(io.BytesIO(damaged))


@pytest.mark.timeout(60)
def test_loops_of_links_end(class_folders):
    folder = class_folders(["a", "b"], 1)
    for name in ("a", "b"):
        for other in ("..", ".", "../a", "../b"):
            (folder / name / f"link-{other.replace('/', '')}").symlink_to(other)
    assert {str(folder / "a/000.png"), str(folder / "b/000.png")} <= set(image_files(folder))
    names = [f"{number:02d}" for number in range(20)]
    for name in names:
        (folder / name).mkdir()
        for other in names:
            (folder / name / other).symlink_to(folder / other)
    with pytest.raises(UserError, match="by more than 100 ways"):
        image_files(folder)


def arrow_file(path):
    (file,) = path.glob("**/*.arrow")
    return file


def test_offsets_beyond_the_buffers_of_an_arrow_file(saved_dataset, section):
    """A crafted file in the right form, whose offsets point a gigabyte away."""
    path = saved_dataset({"image": [b"abcdefgh" * 4] * 3, "label": [0, 0, 0]})
    file = arrow_file(path)
    content = file.read_bytes()
    offsets = struct.pack("<4i", 0, 32, 64, 96)
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, struct.pack("<4i", 0, 2**30, 2**30 + 8, 2**30 + 9)))
    with pytest.raises(UserError, match="cannot be read as a saved Hugging Face dataset") as caught:
        build_dataset(section(path), num_classes=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_file", [True, False])
def test_arrow_files_that_are_streamed_are_validated_too(is_file, tmp_path):
    table = pyarrow.table({"image": [b"abcdefgh" * 4] * 3, "label": [0, 0, 0]})
    path = tmp_path / "a.arrow"
    writer = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with writer(str(path), table.schema) as sink:
        sink.write_table(table)
    check_arrow(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<4i", 0, 32, 64, 96), struct.pack("<4i", 0, 2**30, 2**30, 2**30)))
    with pytest.raises(pyarrow.ArrowInvalid):
        check_arrow(path)


NOTES = ["", "[]", "null", "{}", "{", '{"_data_files": 3}', "[" * 100_000, '"\\ud800"', '{"features": {"image": 3}}']


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "dataset_dict.json"])
@pytest.mark.parametrize("text", NOTES)
def test_malformed_notes_of_a_saved_dataset(name, text, saved_dataset, section):
    path = saved_dataset({"image": [b"x"], "label": [0]})
    (path / name if name == "dataset_dict.json" else path / "train" / name).write_text(text)
    if name == "dataset_info.json" and text in ("{}", '{"_data_files": 3}'):  # the table itself says what it has
        assert len(build_dataset(section(path), num_classes=1)) == 1
        return
    with pytest.raises(UserError) as caught:
        build_dataset(section(path), num_classes=1)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_a_saved_dataset_are_in_its_folder(saved_dataset, section, tmp_path):
    path = saved_dataset({"image": [b"x"], "label": [0]})
    state = path / "train" / "state.json"
    note = json.loads(state.read_text())
    arrow_file(path).rename(tmp_path / "elsewhere.arrow")
    state.write_text(json.dumps(note | {"_data_files": [{"filename": "../../elsewhere.arrow"}]}))
    with pytest.raises(UserError, match="is not a file of its folder"):
        build_dataset(section(path), num_classes=1)


def test_a_cut_arrow_file(saved_dataset, section):
    path = saved_dataset({"image": [b"x" * 1000], "label": [0]})
    file = arrow_file(path)
    whole = file.read_bytes()
    for length in (0, 3, 100, len(whole) - 700):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"data\.path"):
            build_dataset(section(path), num_classes=1)
