"""A folder of features: what is there and what is not, and folders that are damaged or from a stranger."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config import UserError
from grpo.texts import FeatureStore, FeatureWriter

ABOUT = {"encoder": "t5", "sha256": "abc"}


def write(folder, texts, *, width=4, encoder=ABOUT, precision="fp32"):
    """Text number i has i + 1 rows that hold i."""
    writer = FeatureWriter(folder, encoder=encoder, width=width, max_tokens=50, precision=precision)
    known = writer.start()
    new = [text for text in texts if writer.key(text) not in known]
    for number in (int(text.split()[1]) for text in new):
        writer.write([f"text {number}"], [torch.full((number + 1, width), float(number))])
    writer.finish()
    return folder


def test_texts_are_found_whatever_their_shard(tmp_path):
    texts = [f"text {number}" for number in range(40)]
    store = FeatureStore(write(tmp_path / "f", texts), rows=60, width=4)
    condition = store([texts[31], texts[0], texts[31]])
    assert condition.mask.sum(1).tolist() == [32, 1, 32]
    assert condition.features.sum((1, 2)).tolist() == [32 * 31 * 4, 0, 32 * 31 * 4]
    assert store.missing(texts) == []
    with pytest.raises(UserError, match=r"has no features of 'text 41': add them with `grpo encode-text`"):
        store(["text 41"])


def test_a_folder_grows(tmp_path):
    write(tmp_path / "f", ["text 1", "text 2"])
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "f").glob("*.safetensors")}
    store = FeatureStore(write(tmp_path / "f", ["text 2", "text 3"]), rows=9, width=4)
    assert len(store) == 3
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "f").glob("*.safetensors")}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_a_shard_that_a_killed_job_left_is_kept_and_a_begun_one_is_not(tmp_path):
    folder = write(tmp_path / "f", ["text 1"])
    writer = FeatureWriter(folder, encoder=ABOUT, width=4, max_tokens=50, precision="fp32")
    writer.write(["text 2"], [torch.ones(1, 4)])
    (folder / ".features-x.safetensors.unfinished").write_bytes(b"half")
    assert FeatureStore(folder, rows=9, width=4).missing(["text 2"]) == ["text 2"]  # not named yet
    assert writer.start() == {writer.key("text 1"), writer.key("text 2")}
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"width": 8}, "width differ"),
        ({"encoder": {"encoder": "t5", "sha256": "x"}}, "encoder differ"),
        ({"precision": "bf16"}, "precision differ"),
    ],
)
def test_features_of_another_encoder_are_not_mixed(tmp_path, other, told):
    with pytest.raises(UserError, match=f"holds features of something else: {told}"):
        write(write(tmp_path / "f", ["text 1"]), ["text 2"], **other)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no features"):
        write(tmp_path, ["text 1"])


def shard(folder):
    return next(folder.glob("features-*.safetensors"))


def crafted(folder, **tensors):
    save_file({**load_file(shard(folder)), **tensors}, shard(folder))


def about(folder, **changes):
    file = folder / "features.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def linked(folder):
    os.rename(shard(folder), folder.parent / "elsewhere")
    (folder / next(iter(json.loads((folder / "features.json").read_text())["shards"]))).symlink_to("../elsewhere")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: shard(folder).unlink(), "No such file"),
        (lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-9]), "cannot be read"),
        (linked, "it is a link or no file"),
        (lambda folder: crafted(folder, starts=torch.tensor([0, 0])), "it is damaged"),  # a mask of zeros
        (lambda folder: crafted(folder, starts=torch.tensor([0, 99])), "it is damaged"),
        (lambda folder: crafted(folder, starts=torch.tensor([2, 4])), "it is damaged"),
        (lambda folder: crafted(folder, keys=torch.zeros(1, 16, dtype=torch.uint8)), "is not what was written"),
        (lambda folder: crafted(folder, features=torch.ones(4, 5)), "it is damaged"),
        (lambda folder: crafted(folder, features=torch.ones(4, 4).long()), "it is damaged"),
        (lambda folder: about(folder, format=2), "of another version"),
        (lambda folder: about(folder, shards={"../secret.safetensors": {}}), "it is damaged"),
        (lambda folder: about(folder, width="4"), "it is damaged"),
        (lambda folder: (folder / "features.json").write_text("[" * 9999), "it is nested too deeply"),
        (lambda folder: (folder / "features.json").unlink(), "it was not written by `grpo encode-text`"),
    ],
)
def test_damage_is_told(tmp_path, spoil, told):
    spoil(write(tmp_path / "f", ["text 3"]))
    with pytest.raises(UserError, match=told):
        FeatureStore(tmp_path / "f", rows=9, width=4)


def test_features_of_another_width_than_the_models(tmp_path):
    with pytest.raises(UserError, match=r"has features of width 4, model\.caption_dim is 2048"):
        FeatureStore(write(tmp_path / "f", ["text 1"]), rows=9, width=2048)
