"""WebDataset and Parquet: what is read, by whom, in which order, and what is refused."""

import gzip
import json
import random
import tarfile

import datasets
import numpy as np
import pytest
import torch

from grpo.config import UserError
from grpo.data import build_dataset, build_stream
from grpo.data.tar_files import expand_braces
from grpo.parallel import World

COUNT = 23
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(params=["webdataset", "parquet"])
def source(request, tars, parquet):
    return {"webdataset": tars, "parquet": parquet}[request.param]()


def stream_of(dataset, *, num_workers=0, rank=0, size=1):
    world = World(rank, size, rank, size, torch.device("cpu"))
    return build_stream(dataset, batch_size=6, seed=3, num_workers=num_workers, world=world)


def test_images_and_labels_are_those_of_the_files(source, section, make_images):
    dataset = build_dataset(section(source), num_classes=3)
    assert dataset.class_ids.tolist() == [index % 3 for index in range(COUNT)]
    for index, image in enumerate(make_images(COUNT)):
        assert np.array_equal(np.array(dataset.whole(index)), np.array(image))
    assert dataset.fingerprint == build_dataset(section(source), num_classes=3).fingerprint
    with_limit = build_dataset(section(source, name=dataset.data.name), num_classes=3)
    assert len(with_limit) == COUNT


def test_order_is_exact_on_any_ranks_and_workers_and_after_a_stop(source, section, numbered_images):
    dataset = build_dataset(section(source), num_classes=3)
    whole = stream_of(dataset)
    expected = numbered_images([next(whole) for _ in range(9)])  # 54 samples, three epochs
    assert {number: value[0] % 3 == value[1] for number, value in expected.items()} == dict.fromkeys(range(54), True)
    assert sorted(expected[number][0] for number in range(COUNT)) == list(range(COUNT))
    first = [stream_of(dataset, num_workers=2, rank=rank, size=2) for rank in range(2)]
    before = [next(stream) for _ in range(4) for stream in first]
    again = build_dataset(section(source), num_classes=3)
    second = stream_of(again, num_workers=1)
    second.load_state_dict(first[0].state_dict())
    assert numbered_images([*before, *(next(second) for _ in range(5))]) == expected


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda index: ("json", json.dumps({"label": index % 3})), ["0", "1", "2"]),
        (lambda index: ("json", json.dumps({"caption": "x", "label": "abc"[index % 3]})), ["a", "b", "c"]),
        (lambda index: ("cls", f"{'abc'[index % 3]}\n"), ["a", "b", "c"]),
    ],
    ids=["number in json", "name in json", "name"],
)
def test_labels_are_numbers_or_names(tars, section, label, names):
    dataset = build_dataset(section(tars(label)), num_classes=3)
    assert dataset.class_ids.tolist() == [index % 3 for index in range(COUNT)]
    assert dataset.class_names == names


def test_index_of_tars_is_made_once_and_again_for_a_changed_shard(
    tars, section, monkeypatch, make_images, encoded, write_tar
):
    from grpo.data import webdataset

    path, read = tars(), []
    monkeypatch.setattr(
        webdataset, "index_shard", lambda shard, call=webdataset.index_shard: read.append(shard) or call(shard)
    )
    first = build_dataset(section(path), num_classes=3)
    assert len(read) == 3
    assert build_dataset(section(path), num_classes=3).fingerprint == first.fingerprint
    assert len(read) == 3
    write_tar(path / "images-train-001.tar", [("a.png", encoded(make_images(1)[0])), ("a.cls", b"2")])
    changed = build_dataset(section(path), num_classes=3)
    assert [shard.name for shard in read[3:]] == ["images-train-001.tar"]
    assert changed.class_ids.tolist() == [
        *[index % 3 for index in range(8)],
        2,
        *[index % 3 for index in range(16, 23)],
    ]
    assert changed.fingerprint["files"] != first.fingerprint["files"]
    index = next((path / ".grpo-cache").glob("tar-*.npz"))
    with np.load(index) as arrays:
        outside = dict(arrays) | {"offsets": arrays["offsets"] + 10**9}
    np.savez(index, **outside)
    assert build_dataset(section(path), num_classes=3).fingerprint == changed.fingerprint
    assert len(read) == 7


def test_patterns_files_and_splits_choose_files(tars, section):
    path = tars()
    sizes = {
        str(path / "images-train-{000..001}.tar"): 16,
        str(path / "images-train-00[12].tar"): 15,
        str(path / "images-train-002.tar"): 7,
    }
    assert {name: len(build_dataset(section(name), num_classes=3)) for name in sizes} == sizes
    (path / "images-validation-0.tar").write_bytes((path / "images-train-002.tar").read_bytes())
    lengths = [len(build_dataset(section(path, split=split), num_classes=3)) for split in ("train", "validation")]
    assert lengths == [23, 7]
    assert expand_braces("{8..11}-{0..1}")[:3] == ["8-0", "8-1", "9-0"]


def test_damaged_image_in_a_shard_is_named_and_replaced(tars, section, make_images, caplog, encoded, write_tar):
    members = [(f"{i}.{ending}", content) for i in range(3) for ending, content in (("png", b"no"), ("cls", b"0"))]
    members[4] = ("2.png", encoded(make_images(1)[0]))
    path = write_tar(tars() / "bad" / "x.tar", members)
    dataset = build_dataset(section(path), num_classes=1)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    batch = next(build_stream(dataset, batch_size=3, seed=0, num_workers=0, world=world))
    assert batch.indices.tolist() == [2, 2, 2]
    assert f"'0' in {path} is not an image file that can be read" in caplog.text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"has no images: members are named KEY\.jpg"),
        ([("a.txt", b"x")], r"has no images"),
        ([("a.png", b"x")], r"'a' in .*x\.tar has no label: a member KEY\.cls"),
        ([("a.png", b"x"), ("a.cls", b"")], r"'a' in .*: its \.cls has no label"),
        ([("a.png", b"x"), ("a.cls", b"\xff\xfe")], r"'a' in .*: its \.cls cannot be read"),
        ([("a.png", b"x"), ("a.json", b"{")], r"'a' in .*: its \.json cannot be read"),
        ([("a.png", b"x"), ("a.json", b'{"label": 1.5}')], r"its \.json has no label"),
        ([("a.png", b"x"), ("a.cls", b"7")], r"'a' in .*x\.tar has label 7, outside 0\.\.2"),
        ([("a.png", b"x"), ("a.cls", b"9" * 30)], r"has the label 9{30}: labels count from 0"),
        ([("a.png", b"x"), ("a.cls", b"9" * 5000)], r"its \.cls has no label"),
        ([("a.png", b"x"), ("a.cls", b"cat"), ("b.png", b"x"), ("b.cls", b"3")], "both 3 and 'cat' for labels"),
        ([("a.png", b"x"), ("a.cls", b"0"), ("b.png", b"x"), ("b.cls", "\u00b2".encode())], "both 0 and '\u00b2'"),
        ([("a.png", b"x"), ("a.json", b'{"label": "\\ud800"}')], r"its \.json cannot be read"),
    ],
)
def test_bad_members_are_told_in_one_line(tmp_path, section, members, message, write_tar):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message) as raised:
        build_dataset(section(path), num_classes=3)
    assert len(raised.value.problems) == 1
    assert "\n" not in str(raised.value)


def header(name: bytes, size: int, kind: bytes) -> bytes:
    """A tar header that says of its content what it likes; sizes beyond what octal digits can say are binary."""
    block = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else (2**96 + size).to_bytes(12, "big")
    block[156:157], block[148:156] = kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def read_all(section):
    dataset = build_dataset(section, num_classes=3)
    next(build_stream(dataset, batch_size=1, seed=0, num_workers=0, world=ALONE))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["webdataset", "stream"])
@pytest.mark.parametrize(
    "harm",
    [
        header(b"a.png", -512, b"0"),  # the next header would be this one
        header(b"a", 2**62, b"x"),
        header(b"a", 2**62, b"L"),
        header(b"a", 0, b"x") * 3000,
        header(b"a", 0, b"g") * 3000,
        (header(b"a", 4, b"L") + b"abc".ljust(512, b"\0")) * 3000,
    ],
    ids=["backwards", "endless header", "endless name", "nested headers", "nested global headers", "nested names"],
)
def test_headers_made_to_harm(tmp_path, section, name, harm, write_tar):
    path = write_tar(tmp_path / "x.tar", [("a.png", b"x"), ("a.cls", b"0")])
    path.write_bytes(harm + path.read_bytes())
    with pytest.raises(UserError, match=r"can(not)? be read|has the columns") as raised:
        read_all(section(path, name=name))
    assert "\n" not in str(raised.value)


def test_damaged_tars_are_told(tars, section, tmp_path):
    path = tars() / "images-train-001.tar"
    content = path.read_bytes()
    middle = content[: len(content) // 2]
    with_garbage = bytearray(content)
    with_garbage[1024:1536] = random.Random(0).randbytes(512)  # the second header
    damaged = {
        "is not a tar file": b"no tar at all, but long enough to look like one" * 40,
        "is compressed: unpack it": gzip.compress(content),
        "(is cut off at byte|is damaged at byte|unexpected end of data)": middle,
        "is damaged at byte": bytes(with_garbage),
        "empty file": b"",
    }
    for message, bad in damaged.items():
        path.write_bytes(bad)
        with pytest.raises(UserError, match=message) as raised:
            build_dataset(section(path.parent), num_classes=3)
        assert "images-train-001.tar" in str(raised.value)
    path.unlink()
    with pytest.raises(UserError, match=r"images-train-001\.tar does not exist"):
        build_dataset(section(path.parent / "images-train-{000..002}.tar"), num_classes=3)
    with pytest.raises(UserError, match=r"neither a folder 'test' nor .tar files with 'test'"):
        build_dataset(section(path.parent, split="test"), num_classes=3)


def test_names_that_lead_outside_stay_names(tmp_path, section, make_images, encoded, write_tar):
    image = encoded(make_images(1)[0])
    members = [("../../out.png", image), ("../../out.cls", b"0"), ("/etc/a.png", image), ("/etc/a.cls", b"1")]
    path = write_tar(tmp_path / "in" / "x.tar", members)
    dataset = build_dataset(section(path, index_cache="none"), num_classes=2)
    assert [dataset.whole(index).size for index in range(2)] == [(24, 20)] * 2
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_bad_parquet_is_told(parquet, section, tmp_path):
    path = parquet()
    with pytest.raises(UserError, match=r"train-00000.*has the columns \['image', 'extra'\]; a label is looked for"):
        build_dataset(section(parquet("nolabel", label=lambda index: None)), num_classes=3)
    with pytest.raises(UserError, match=r"row 7 of .*train-00001.* has label 9"):
        build_dataset(section(parquet("range", label=lambda index: 9 if index == 15 else 0)), num_classes=3)
    with pytest.raises(UserError, match=r"column 'label' .* holds string: labels must be integers"):
        build_dataset(section(parquet("text", label=lambda index: "cat")), num_classes=3)
    file = path / "train-00001-of-00003.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"train-00001.*cannot be read as a Parquet file") as raised:
        build_dataset(section(path), num_classes=3)
    assert "\n" not in str(raised.value)
    file.write_bytes(content[:4] + bytes(2000) + content[2004:])
    with pytest.raises(UserError, match=r"parquet cannot be read: ") as raised:
        build_dataset(section(path), num_classes=3)
    assert "\n" not in str(raised.value)


def test_class_names_of_the_hub_come_along(section, tmp_path, make_images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = datasets.Dataset.from_dict({"image": make_images(4), "label": [0, 1, 1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    dataset = build_dataset(section(tmp_path / "a.parquet"), num_classes=2)
    assert dataset.class_names == ["x", "y"]
    assert dataset.captions(dataset.condition([1, 3])) == ["y", "x"]
    assert dataset.whole(2).size == (24, 20)
