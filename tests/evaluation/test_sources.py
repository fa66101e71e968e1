"""Images from an npz, a folder, a data set and a model, and what is said about bad ones."""

import os
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from grpo.config import Data, UserError
from grpo.data import build_dataset
from grpo.evaluation import (
    DatasetImages,
    DrawnImages,
    NpzWriter,
    batches_in_order,
    classes_in_turn,
    drawn_classes,
    open_images,
    save_image,
    save_pngs,
)
from grpo.evaluation.sources import FolderImages, NpzImages
from grpo.models import Condition
from grpo.observe import write_atomically


def random_pixels(count, *, seed=0, side=6):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_written_npz_and_pngs_are_read_back_exactly(tmp_path):
    pixels, class_ids = random_pixels(5), torch.tensor([2, 0, 1, 1, 0])
    with NpzWriter(tmp_path / "a.npz", class_ids, size=(6, 6)) as npz:
        npz.write(pixels[:3])
        npz.write(pixels[3:])
    (tmp_path / "pngs").mkdir()
    save_pngs(tmp_path / "pngs", pixels, torch.arange(5))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 6, 6, 3)
        assert arrays["arr_0"].dtype == np.uint8
    from_npz, from_folder = open_images(tmp_path / "a.npz"), open_images(tmp_path / "pngs")
    assert_close(from_npz.pixels(0, 9), pixels)
    assert_close(from_folder.pixels(0, 9), pixels)
    assert_close(from_npz.class_ids, class_ids)
    assert from_folder.class_ids is None
    assert_close(open_images(tmp_path / "a.npz", limit=2).pixels(1, 9), pixels[1:2])


def test_an_interrupted_npz_does_not_appear(tmp_path):
    def interrupted():
        with NpzWriter(tmp_path / "a.npz", torch.zeros(2).long(), size=(6, 6)) as npz:
            npz.write(random_pixels(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_class_folders_give_classes(tmp_path):
    for name, seed in (("owl", 1), ("cat", 2)):
        (tmp_path / name).mkdir()
        save_pngs(tmp_path / name, random_pixels(2, seed=seed), torch.arange(2))
    images = FolderImages(tmp_path)
    assert images.class_ids.tolist() == [0, 0, 1, 1]
    assert_close(images.pixels(2, 4), random_pixels(2, seed=1))


def test_data_set_images_are_its_uint8_pixels():
    dataset = build_dataset(Data(name="synthetic", image_size=8), num_classes=3)
    images = DatasetImages(dataset, limit=4)
    assert len(images) == 4
    assert_close(images.pixels(2, 9)[0], dataset.pixels(2))
    assert images.class_ids.tolist() == dataset.class_ids[:4].tolist()


def test_drawn_images_get_their_class_and_number():
    asked = []
    images = DrawnImages(torch.tensor([5, 6, 7]), lambda condition, row_ids: asked.append((condition, row_ids)))
    images.pixels(1, 10)
    condition, row_ids = asked[0]
    assert condition.class_ids.tolist() == [6, 7]
    assert row_ids.tolist() == [1, 2]


def test_conditions_without_a_class_have_no_class_ids():
    @dataclass(frozen=True)
    class Words(Condition):
        words: torch.Tensor

        @property
        def rows(self):
            return len(self.words)

    images = DrawnImages(Words(torch.arange(3)), lambda condition, row_ids: condition.words)
    assert len(images) == 3
    assert images.class_ids is None
    assert images.pixels(1, 9).tolist() == [1, 2]


def test_classes_in_turn():
    assert classes_in_turn([3, 8], 5).class_ids.tolist() == [3, 8, 3, 8, 3]


def test_random_classes_are_uniform_and_do_not_depend_on_their_number():
    many, few = (drawn_classes([4, 7, 9], count, order="random", seed=3).class_ids for count in (3000, 70))
    assert_close(many[:70], few)
    assert all(900 < (many == class_id).sum() < 1100 for class_id in (4, 7, 9))
    assert not torch.equal(few, drawn_classes([4, 7, 9], 70, order="random", seed=4).class_ids)


def test_batches_in_order_are_all_images():
    pixels = random_pixels(7)
    images = DrawnImages(torch.arange(7), lambda condition, row_ids: pixels[row_ids])
    batches = list(batches_in_order(images, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert_close(torch.cat(batches), pixels)


def save_array(path, **arrays):
    np.savez(path, **arrays)
    return path


PLAIN = {"arr_0": np.zeros((2, 6, 6, 3), np.uint8)}


def save_npy(path, array):
    with path.open("wb") as file:
        np.save(file, array)
    return path


def make_pipe(folder):
    os.mkfifo(folder / "a.npz")
    return folder / "a.npz"


@pytest.mark.parametrize("write", ["images", "end"])
def test_a_full_disk_leaves_nothing(write, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    npz = NpzWriter(tmp_path / "a.npz", torch.zeros(1).long(), size=(6, 6))
    target = (npz._images, "write") if write == "images" else (npz._archive, "close")
    monkeypatch.setattr(*target, full)
    with pytest.raises(UserError, match=r"a\.npz cannot be written: No space left on device"), npz:
        npz.write(random_pixels(1))
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"a\.png cannot be written: No space left"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.npz", "does not exist"),
        (lambda folder: save_array(folder / "a.npz", images=np.zeros(3)), "not an .npz with an array arr_0"),
        (lambda folder: save_array(folder / "a.npz", arr_0=np.zeros((2, 3, 6, 6), np.uint8)), "expected uint8"),
        (lambda folder: save_array(folder / "a.npz", arr_0=np.zeros((2, 6, 6, 3))), "expected uint8"),
        (
            lambda folder: save_array(folder / "a.npz", arr_0=np.zeros((2, 6, 6, 3), np.uint8), arr_1=np.zeros(3)),
            "arr_1 has shape",
        ),
        (lambda folder: save_array(folder / "a.npz", arr_0=np.array([{}], dtype=object)), "not an .npz"),
        (lambda folder: save_array(folder / "a.npz", **PLAIN, arr_1=np.array(["a", "b"])), "expected whole numbers"),
        (lambda folder: save_array(folder / "a.npz", **PLAIN, arr_1=np.array([0, 2**40])), "no class id"),
        (lambda folder: save_array(folder / "a.npz", **PLAIN, mu=np.array(["a"]), sigma=np.eye(1)), "mean and cov"),
        (lambda folder: save_array(folder / "a.npz", **PLAIN, mu=np.ones(2), sigma=np.eye(3)), "mean and cov"),
        (lambda folder: save_array(folder / "a.npz", **PLAIN, mu=np.full(2, np.nan), sigma=np.eye(2)), "finite"),
        (lambda folder: save_array(folder / "a.npz", **PLAIN, mu=np.ones(2), sigma=-np.eye(2)), "variance below 0"),
        (lambda folder: save_npy(folder / "a.npz", PLAIN["arr_0"]), "no zip archive"),
        (make_pipe, "a pipe or a device"),
        (lambda folder: folder, "has no images"),
    ],
)
def test_bad_images_are_told_in_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        open_images(make(tmp_path))
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"not an \.npz"):
        NpzImages(tmp_path / "a.npz")


def test_damaged_images_and_other_sizes_are_named(tmp_path):
    save_pngs(tmp_path, random_pixels(1), torch.tensor([0]))
    save_pngs(tmp_path, random_pixels(1, side=8), torch.tensor([1]))
    (tmp_path / "000002.png").write_bytes(b"no image")
    images = FolderImages(tmp_path)
    with pytest.raises(UserError, match=r"000001.png is 8x8, the first image 6x6"):
        images.pixels(1, 2)
    with pytest.raises(UserError, match=r"000002.png is not an image file"):
        images.pixels(2, 3)


def test_grey_images_count_as_rgb(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    assert_close(FolderImages(tmp_path).pixels(0, 1), torch.full((1, 3, 4, 4), 77, dtype=torch.uint8))


def test_zeros_without_an_end_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.evaluation.sources.UNPACKED_BYTES", 2**20)
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((2000, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"arr_0\.npy would unpack to \d+ bytes"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2000, 32, 32, 3), np.uint8))
    assert len(open_images(tmp_path / "a.npz")) == 2000


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0", b"text")
    with pytest.raises(UserError, match="arr_0 is no array"):
        open_images(tmp_path / "a.npz")


def test_no_link_of_a_strangers_folder_is_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in (".grid.png.partial", ".images.npz.partial", f".page.html.{os.getpid()}"):
        (tmp_path / name).symlink_to(mine)
    (tmp_path / "grid.png").symlink_to(mine)
    save_image(Image.new("RGB", (2, 2)), tmp_path / "grid.png")
    with NpzWriter(tmp_path / "images.npz", None, size=(2, 2), count=0):
        pass
    write_atomically(tmp_path / "page.html", "page")
    assert mine.read_text() == "mine"
    assert [(tmp_path / name).is_symlink() for name in ("grid.png", "images.npz", "page.html")] == [False] * 3
