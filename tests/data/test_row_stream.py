"""Rows that are read from front to back: their order, its exactness, and what is refused."""

import gzip
import json

import datasets
import numpy as np
import pytest
import torch

from grpo.config import UserError
from grpo.data import build_dataset, build_stream
from grpo.parallel import World

COUNT = 23  # of the fixtures


@pytest.fixture
def arrow(tmp_path, make_images):
    """Image i, of class "xyz"[i mod 3], in Arrow files."""

    def make():
        names = datasets.ClassLabel(names=["x", "y", "z"])
        features = datasets.Features({"image": datasets.Image(), "label": names})
        columns = {"image": make_images(COUNT), "label": [index % 3 for index in range(COUNT)]}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "arrow", num_shards=3)
        return tmp_path / "arrow" / "data-*.arrow"

    return make


@pytest.fixture(params=["tars", "parquet", "arrow"])
def source(request):
    return request.getfixturevalue(request.param)()


@pytest.fixture
def streamed(section):
    def make(path, *, num_classes=3, **keys):
        keys = {"name": "stream", "shuffle_window": 7} | keys
        return build_dataset(section(path, **keys), num_classes=num_classes)

    return make


def stream_of(dataset, *, num_workers=0, rank=0, size=1, seed=3):
    world = World(rank, size, rank, size, torch.device("cpu"))
    return build_stream(dataset, batch_size=6, seed=seed, num_workers=num_workers, world=world)


def test_every_epoch_has_every_row_in_another_order(source, streamed, numbered_images):
    dataset = streamed(source)
    stream = stream_of(dataset)
    found = numbered_images([next(stream) for _ in range(12)])  # 72 samples, three epochs
    epochs = [[found[number] for number in range(start, start + COUNT)] for start in (0, COUNT, 2 * COUNT)]
    assert all(sorted(red for red, _ in epoch) == list(range(COUNT)) for epoch in epochs)
    assert all(red % 3 == class_id for epoch in epochs for red, class_id in epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbered_images([next(stream_of(dataset, seed=4))]) != numbered_images([next(stream_of(dataset))])


@pytest.mark.parametrize("stop", range(1, 9))
def test_goes_on_exactly_on_any_number_of_ranks(parquet, streamed, stop, numbered_images):
    path = parquet()
    whole = stream_of(streamed(path))
    expected = numbered_images([next(whole) for _ in range(12)])
    first = [stream_of(streamed(path), num_workers=2, rank=rank, size=2) for rank in range(2)]
    before = [next(stream) for _ in range(stop) for stream in first]
    states = [json.loads(json.dumps(stream.state_dict())) for stream in first]
    assert states[0] == states[1]
    assert states[0]["samples"] == 6 * stop
    second = stream_of(streamed(path))
    second.load_state_dict(states[0])
    assert numbered_images([*before, *(next(second) for _ in range(12 - stop))]) == expected
    second.load_state_dict(states[0])
    assert numbered_images([next(second)]).items() <= expected.items()


@pytest.mark.parametrize("stop", [2, 5])
def test_goes_on_exactly_in_other_files(source, streamed, stop, numbered_images):
    whole = stream_of(streamed(source))
    expected = numbered_images([next(whole) for _ in range(9)])
    first, second = stream_of(streamed(source)), stream_of(streamed(source))
    before = [next(first) for _ in range(stop)]
    second.load_state_dict(first.state_dict())
    assert numbered_images([*before, *(next(second) for _ in range(9 - stop))]) == expected


def test_named_classes_become_the_models(arrow, streamed, tmp_path):
    dataset = streamed(arrow(), num_classes=5)
    assert dataset.class_names == ["x", "y", "z", "3", "4"]
    (tmp_path / "map.txt").write_text("x 4\ny 1\nz 0\n")
    mapped = streamed(dataset.data.path, num_classes=5, class_map=str(tmp_path / "map.txt"))
    batches = [next(stream_of(one)) for one in (dataset, mapped)]
    plain, other = (batch.condition.class_ids for batch in batches)
    assert torch.equal(torch.tensor([4, 1, 0])[plain], other)
    assert batches[0].captions == batches[1].captions == [("x", "y", "z")[label] for label in plain]


def test_damaged_image_is_replaced_alike_on_all_ranks_and_counted_once(
    tmp_path, streamed, make_images, caplog, encoded, write_tar, numbered_images
):
    images = [encoded(image) for image in make_images(6)]
    images[2] = images[3] = b"no image"
    images[3] += b"!"
    members = [(f"{i}.{end}", data) for i in range(6) for end, data in (("png", images[i]), ("cls", b"0"))]
    dataset = streamed(write_tar(tmp_path / "x.tar", members))
    stream = stream_of(dataset)
    expected = [next(stream) for _ in range(5)]
    assert {red for red, _ in numbered_images(expected).values()} == {0, 1, 4, 5}
    assert len(dataset.unreadable) == 2
    assert "image 2 of" in caplog.text
    ranks = [stream_of(dataset, rank=rank, size=2) for rank in range(2)]
    assert numbered_images([next(rank) for _ in range(5) for rank in ranks]) == numbered_images(expected)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: cut(path / "train-00000-of-00003.parquet", -50), "cannot be read: "),
        (lambda path: [file.write_bytes(b"") for file in path.iterdir()], "cannot be read: "),
        (lambda path: [file.unlink() for file in path.iterdir()], r"has no \.parquet, \.tar, \.arrow files"),
    ],
    ids=["cut off", "empty", "no files"],
)
def test_bad_files_are_told_in_one_line(parquet, streamed, change, message):
    path = parquet()
    change(path)
    with pytest.raises(UserError, match=message) as raised:
        next(stream_of(streamed(path)))
    assert "\n" not in str(raised.value)


def test_bad_rows_are_told(parquet, tars, streamed, section):
    with pytest.raises(UserError, match=r"has label 5, outside 0\.\.2: correct the label or num_classes"):
        next(stream_of(streamed(parquet("far", label=lambda index: 5))))
    with pytest.raises(UserError, match=r"has label -1, outside 0\.\.2147483647: correct"):  # of a test split
        next(stream_of(streamed(parquet("unlabelled", label=lambda index: -1), num_classes=None)))
    with pytest.raises(UserError, match="has the label 'cat': it must be an integer"):
        next(stream_of(streamed(parquet("text", label=lambda index: "cat"))))
    with pytest.raises(UserError, match=r"has the columns .* a label is looked for"):
        streamed(parquet("none", label=lambda index: None))
    with pytest.raises(UserError, match="class_map needs names of classes"):
        streamed(parquet("named"), class_map="x.txt")
    path = tars()
    for file in path.glob("*.tar"):
        file.write_bytes(gzip.compress(b"x" * 5000))
    with pytest.raises(UserError, match="cannot be read"):
        next(stream_of(streamed(path)))


def test_state_of_another_kind_is_refused(parquet, streamed):
    with pytest.raises(UserError, match="of a run on another kind of data set"):
        stream_of(streamed(parquet())).load_state_dict({"samples": 4})


def test_address_that_cannot_be_reached(section, monkeypatch):
    def fail(*arguments, **keywords):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.data_files.DataFilesList.from_patterns", fail)
    with pytest.raises(UserError, match=r"hf://datasets/a/b/\*\.parquet cannot be listed: no network"):
        build_dataset(section(path="hf://datasets/a/b/*.parquet"), num_classes=3)


def test_fingerprint_is_of_the_files(parquet, streamed):
    path = parquet()
    before = streamed(path).fingerprint
    assert streamed(path).fingerprint == before
    (path / "train-00002-of-00003.parquet").rename(path / "train-9.parquet")
    assert {key for key, value in streamed(path).fingerprint.items() if value != before[key]} == {"files"}
    assert np.all([isinstance(value, str | int) for value in before.values()])
