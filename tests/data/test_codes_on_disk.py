"""Codes on disk: what is written, what it is taken for, and which sample sees which view."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from torchvision.transforms import TenCrop

from grpo.config import Encode, UserError
from grpo.data import CodeWriter, Views, build_codes, build_dataset, build_stream, to_pixels
from grpo.data.images import center_crop
from grpo.models import TOKENIZER_SPECS, VQModel, weights_sha256
from grpo.parallel import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
COUNT, VARIANTS, LENGTH = 7, 10, 16


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=900)).eval()


@pytest.fixture
def folder(class_folders, section):
    return section(class_folders(["a"], COUNT))


def about(dataset, tokenizer, **changes):
    return {
        "format": 1,
        "count": len(dataset),
        "variants": VARIANTS,
        "length": LENGTH,
        "codebook_size": 900,
        "shard_size": 3,
        "augmentation": "ten_crop",
        "crop_ranges": [1.1],
        "class_names": ["a"],
        "fingerprint": {**dataset.fingerprint, "tokenizer": weights_sha256(tokenizer)},
    } | changes


def codes_of(index):
    """[A, T]; each tells image and view."""
    return np.arange(VARIANTS)[:, None] + 100 * index + np.zeros((1, LENGTH), dtype=int)


def write(path, dataset, tokenizer, *, unreadable=(), variants=VARIANTS, **changes):
    writer = CodeWriter(path, about(dataset, tokenizer, variants=variants, **changes), dataset.class_ids)
    for number in writer.start():
        rows = writer.shards[number]
        reasons = {index: "bad image" for index in rows if index in unreadable}
        writer.write(number, np.stack([codes_of(index)[:variants] for index in rows]), reasons)
    return writer.finish()


def stream_of(dataset, **keys):
    return build_stream(dataset, **{"batch_size": 4, "seed": 0, "num_workers": 0, "world": ALONE} | keys)


def seen(batches):
    """Sample number -> image and view."""
    numbers = torch.cat([batch.sample_ids for batch in batches]).tolist()
    codes = torch.cat([batch.codes for batch in batches])
    assert codes.dtype == torch.int64
    assert codes.shape[1:] == (LENGTH,)
    assert codes.eq(codes[:, :1]).all()
    return dict(zip(numbers, (divmod(code, 100) for code in codes[:, 0].tolist()), strict=True))


@pytest.mark.parametrize("size", [(40, 30), (31, 57)])
def test_ten_crops_are_torchvisions(size, make_images):
    image = make_images(1)[0].resize(size)
    views = Views(Encode(output="x", augmentation="ten_crop", crop_ranges=[1.1, 1.05]), 16)
    expected = [
        to_pixels(crop) for crop_range in (1.1, 1.05) for crop in TenCrop(16)(center_crop(image, int(16 * crop_range)))
    ]
    assert views.count == 20
    assert torch.equal(views(image), torch.stack(expected))


def test_flip_is_the_image_and_its_mirror_image(make_images):
    image = make_images(1)[0]
    views = Views(Encode(output="x", augmentation="flip"), 16)(image)
    assert torch.equal(views[0], to_pixels(center_crop(image, 16)))
    assert torch.equal(views[1], views[0].flip(-1))


def test_samples_see_their_image_and_a_view_of_their_own(folder, tokenizer, tmp_path):
    dataset = build_dataset(folder, num_classes=1)
    write(tmp_path / "codes", dataset, tokenizer)
    dataset = build_dataset(folder.model_copy(update={"codes": str(tmp_path / "codes")}), num_classes=1)
    encode = build_codes(dataset, tokenizer, length=LENGTH, augmented=True, images=False)
    stream = stream_of(dataset)
    batches = [next(stream) for _ in range(70)]
    assert encode(batches[0]) is batches[0].codes
    assert batches[0].images.shape == (4, 3, 0, 0)
    samples = seen(batches)
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert [samples[number][0] for number in range(280)] == indices
    views = np.bincount([view for _, view in samples.values()], minlength=VARIANTS)
    assert 12 <= views.min() <= views.max() <= 50  # 28 each, with a spread of 5
    assert len({samples[number][1] for number in range(280) if samples[number][0] == 3}) > 5

    ranks = [stream_of(dataset, num_workers=rank, world=World(rank, 2, rank, 2, ALONE.device)) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict({"samples": 8})
    assert seen([next(rank) for _ in range(3) for rank in ranks]) == {n: samples[n] for n in range(8, 20)}


def test_images_come_with_plain_codes_where_they_are_wanted(folder, tokenizer, tmp_path):
    dataset = build_dataset(folder, num_classes=1)
    write(tmp_path / "codes", dataset, tokenizer, augmentation="flip", variants=2)
    dataset = build_dataset(folder.model_copy(update={"codes": str(tmp_path / "codes")}), num_classes=1)
    build_codes(dataset, tokenizer, length=LENGTH, augmented=False, images=True)
    stream = stream_of(dataset)
    batch = next(stream)
    assert batch.images.shape == (4, 3, 16, 16)
    places = batch.indices.tolist()
    assert all(torch.equal(image, dataset.pixels(index)) for image, index in zip(batch.images, places, strict=True))
    assert {view for _, view in seen([batch, next(stream)]).values()} == {0}


def test_image_that_was_not_encoded_is_replaced_by_the_next(folder, tokenizer, tmp_path, caplog):
    dataset = build_dataset(folder, num_classes=1)
    order = next(stream_of(dataset, batch_size=7)).indices.tolist()
    write(tmp_path / "codes", dataset, tokenizer, unreadable=order[:1])
    dataset = build_dataset(folder.model_copy(update={"codes": str(tmp_path / "codes")}), num_classes=1)
    build_codes(dataset, tokenizer, length=LENGTH, augmented=True, images=False)
    assert next(stream_of(dataset, batch_size=7)).indices.tolist() == [order[1], *order[1:]]
    assert "bad image" in caplog.text


def test_codes_alone_are_a_data_set(folder, tokenizer, tmp_path):
    dataset = build_dataset(folder, num_classes=1)
    write(tmp_path / "codes", dataset, tokenizer)
    alone = build_dataset(folder.model_copy(update={"name": "codes", "path": str(tmp_path / "codes")}), num_classes=3)
    build_codes(alone, None, length=LENGTH, augmented=True, images=False)
    assert alone.class_names == ["a", "1", "2"]
    batch = next(stream_of(alone))
    expected = next(stream_of(dataset))
    assert torch.equal(batch.indices, expected.indices)
    assert torch.equal(batch.condition.class_ids, expected.condition.class_ids)
    assert batch.images.shape == (4, 3, 0, 0)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_llamagens_folders_are_read_as_they_are(section, tmp_path, tokenizer, dimensions):
    for kind in ("codes", "labels"):
        (tmp_path / f"imagenet16_{kind}").mkdir()
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for index in range(COUNT):
        codes = codes_of(index)[None] if dimensions == 3 else codes_of(index)
        np.save(tmp_path / "imagenet16_codes" / f"{index}.npy", codes)
        np.save(tmp_path / "imagenet16_labels" / f"{index}.npy", np.array([index % 3]))
    dataset = build_dataset(section(tmp_path, name="codes"), num_classes=3)
    assert dataset.class_ids.tolist() == [0, 1, 2, 0, 1, 2, 0]
    build_codes(dataset, tokenizer, length=LENGTH, augmented=True, images=False)
    stream = stream_of(dataset)
    batches = [next(stream) for _ in range(20)]
    samples = seen(batches)
    assert [samples[number][0] for number in range(80)] == torch.cat([b.indices for b in batches]).tolist()
    assert len({view for _, view in samples.values()}) == VARIANTS
    (tmp_path / "imagenet16_codes" / "3.npy").unlink()
    with pytest.raises(UserError, match=r"imagenet16_codes has no 3\.npy"):
        build_dataset(section(tmp_path, name="codes"), num_classes=3)


def changed_labels(folder):
    shutil.copytree(f"{folder.path}/a", f"{folder.path}/0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, folder: changed_labels(folder), "the image files, the labels differ"),
        (lambda codes, folder: folder.model_copy(update={"image_size": 32}), r"image_size \(16, now 32\) differ"),
        (lambda codes, folder: (codes / "codes.json").write_text("[]"), r"codes\.json is damaged"),
        (lambda codes, folder: (codes / "codes.json").unlink(), r"has no codes\.json"),
        (lambda codes, folder: shutil.rmtree(codes), "codes does not exist"),
        (lambda codes, folder: (codes / "codes-00001.npy").unlink(), r"codes-00001\.npy cannot be read: No such file"),
        (lambda codes, folder: (codes / "codes-00001.npy").write_bytes(b"x"), r"codes-00001\.npy cannot be read"),
        (
            lambda codes, folder: np.save(codes / "codes-00001.npy", np.zeros((3, 10, 15), dtype=int)),
            r"codes-00001\.npy is int64 \[3, 10, 15\], expected whole numbers \[3, 10, 16\]",
        ),
        (
            lambda codes, folder: np.save(codes / "labels.npy", np.array([{}] * 7), allow_pickle=True),
            r"labels\.npy cannot be read",
        ),
        (
            lambda codes, folder: (codes / "codes.json").write_text(
                json.dumps(json.loads((codes / "codes.json").read_text()) | {"complete": False})
            ),
            "is not finished: start the same `grpo encode` again",
        ),
    ],
    ids=["files", "size", "damaged", "no json", "gone", "no shard", "no npy", "shape", "pickle", "unfinished"],
)
def test_codes_of_something_else_are_refused(folder, tokenizer, tmp_path, change, message):
    codes = tmp_path / "codes"
    write(codes, build_dataset(folder, num_classes=1), tokenizer)
    section = change(codes, folder)
    section = section if section.__class__ is folder.__class__ else folder
    dataset = build_dataset(section.model_copy(update={"codes": str(codes)}), num_classes=2)
    with pytest.raises(UserError, match=message):
        build_codes(dataset, tokenizer, length=LENGTH, augmented=True, images=False)


def test_other_weights_sizes_and_crops_are_refused(folder, tokenizer, tmp_path):
    write(tmp_path / "codes", build_dataset(folder, num_classes=1), tokenizer)
    dataset = build_dataset(folder.model_copy(update={"codes": str(tmp_path / "codes")}), num_classes=1)
    other = VQModel(tokenizer.config).eval()
    how = {"length": LENGTH, "augmented": True, "images": False}
    with pytest.raises(UserError, match=r"codes of something else: the tokenizer's weights differ"):
        build_codes(dataset, other, **how)
    with pytest.raises(UserError, match=r"has 16 codes an image, and .* ask for 64"):
        build_codes(dataset, tokenizer, **how | {"length": 64})
    with pytest.raises(UserError, match="codes of 10 crops, and none of the images as they are"):
        build_codes(dataset, tokenizer, **how | {"augmented": False})


def test_writer_goes_on_only_with_the_same(folder, tokenizer, tmp_path):
    dataset = build_dataset(folder, num_classes=1)
    whole = write(tmp_path / "codes", dataset, tokenizer)
    assert CodeWriter(tmp_path / "codes", about(dataset, tokenizer), dataset.class_ids).start() == []
    (tmp_path / "codes" / "codes-00001.npy").unlink()
    assert CodeWriter(tmp_path / "codes", about(dataset, tokenizer), dataset.class_ids).start() == [1]
    assert whole.labels.tolist() == [0] * COUNT
    for changes, words in (({"shard_size": 4}, r"shard_size \(3, now 4\)"), ({"augmentation": "flip"}, "augmentation")):
        with pytest.raises(UserError, match=f"holds codes of something else: {words}.* differ; give another folder"):
            CodeWriter(tmp_path / "codes", about(dataset, tokenizer, **changes), dataset.class_ids).start()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no codes"):
        CodeWriter(tmp_path / "other", about(dataset, tokenizer), dataset.class_ids).start()


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, np.zeros(3, dtype=int))


def huge(path):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (1, 1, 2**50)})


HOSTILE = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an archive": archive,
    "larger than its file": huge,
    "no header": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + b"\x10\x27" + b"(" * 10_000),
    "empty": lambda path: np.save(path, np.zeros((1, 2, 0), dtype=int)),
    "beyond int64": lambda path: np.save(path, np.full((1, 1, 1), 2**63, dtype=np.uint64)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["grpo/labels.npy", "grpo/codes-00000.npy", "grpo/codes.json", "x_codes", "x_labels"])
def test_hostile_files_of_codes(kind, place, folder, tokenizer, tmp_path, section):
    if place.startswith("grpo/"):
        write(tmp_path / "grpo", build_dataset(folder, num_classes=1), tokenizer, augmentation="flip")
        file, root = tmp_path / place, tmp_path / "grpo"
    else:
        for name in ("x_codes", "x_labels"):
            (tmp_path / "llamagen" / name).mkdir(parents=True)
            np.save(tmp_path / "llamagen" / name / "0.npy", np.zeros((1, 1, 1), dtype=int))
        file, root = tmp_path / "llamagen" / place / "0.npy", tmp_path / "llamagen"
    file.unlink()
    HOSTILE[kind](file)
    with pytest.raises(UserError) as caught:  # also of one image: that it cannot be read
        build_dataset(section(root, name="codes"), num_classes=1).codes.draw(0, 0, 0)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": [1]}, {"class_names": ["\ud800"]}, {"unreadable": {"9" * 5000: ""}}, {"length": 0},
        {"variants": 0}, {"count": 10**400}, {"codebook_size": True},
    ],
    ids=str,
)  # fmt: skip
def test_crafted_notes_of_codes(change, folder, tokenizer, tmp_path, section):
    write(tmp_path / "codes", build_dataset(folder, num_classes=1), tokenizer)
    file = tmp_path / "codes" / "codes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"codes\.json is damaged|labels\.npy is int64"):
        build_dataset(section(tmp_path / "codes", name="codes"), num_classes=1)


@pytest.mark.parametrize("stopped", ["codes.json", "labels.npy"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt])
def test_writing_that_stopped_at_its_first_files_goes_on(stopped, error, folder, tokenizer, tmp_path, monkeypatch):
    dataset = build_dataset(folder, num_classes=1)
    replace = os.replace

    def stop(source, target):
        if str(target).endswith(stopped):
            raise error
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises((UserError, KeyboardInterrupt)):
            write(tmp_path / "codes", dataset, tokenizer)
    assert write(tmp_path / "codes", dataset, tokenizer).labels.tolist() == [0] * COUNT
