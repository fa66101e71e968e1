import dataclasses
import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from grpo.config import UserError
from grpo.formats import SafeFileSystemReader, read_tensors, safe_load
from grpo.formats.distributed_folders import read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(1)}


class Attack:
    """Unpickling it makes a folder named after its target."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoint"
    dcp.save({**TENSORS, "options": (0.9, None)}, checkpoint_id=path, no_dist=True)
    return path


def change_metadata(folder, change):
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_reads_whole_tensors(folder):
    loaded = read_tensors(folder, prefix="model.")
    assert loaded.keys() == {"a", "b"}
    assert all(torch.equal(loaded[name], TENSORS[f"model.{name}"]) for name in loaded)


def test_reads_plain_python_entries(folder):
    state = {"options": None}
    safe_load(state, SafeFileSystemReader(folder), no_dist=True)
    assert state == {"options": (0.9, None)}


def test_crafted_metadata_is_refused_before_it_runs(folder, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(UserError, match="do not trust"):
        read_tensors(folder)
    assert not (tmp_path / "ran").exists()


def test_code_hidden_in_an_honest_looking_field_is_refused(folder, tmp_path):
    change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Attack(tmp_path / "ran")))
    with pytest.raises(UserError, match="do not trust"):
        read_metadata(folder)
    assert not (tmp_path / "ran").exists()


def test_crafted_shard_is_refused_before_it_runs(tmp_path):
    folder = tmp_path / "checkpoint"
    dcp.save({"options": Attack(tmp_path / "ran")}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(UserError, match="Cannot load"):
        safe_load({"options": None}, SafeFileSystemReader(folder), no_dist=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".."])
def test_files_elsewhere_are_refused(folder, name):
    def point_elsewhere(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = name

    change_metadata(folder, point_elsewhere)
    with pytest.raises(UserError, match="do not trust"):
        read_metadata(folder)


def enlarge(entry):
    entry.size = torch.Size([10**12, 3])


def leave_a_gap(entry):
    entry.chunks[0] = dataclasses.replace(entry.chunks[0], sizes=torch.Size([1, 3]))


def lose_the_chunks(entry):
    entry.chunks = []


def promise_more_than_is_stored(entry):
    entry.size = torch.Size([10**12, 3])
    entry.chunks[0] = dataclasses.replace(entry.chunks[0], sizes=entry.size)


def reach_outside(entry):
    entry.chunks[0] = dataclasses.replace(entry.chunks[0], offsets=torch.Size([-1, 0]))


@pytest.mark.parametrize(
    "craft",
    [enlarge, leave_a_gap, lose_the_chunks, promise_more_than_is_stored, reach_outside],
    ids=lambda f: f.__name__,
)
def test_tensors_that_the_files_do_not_hold_are_refused(folder, craft):
    """Else memory that nobody wrote would be taken for weights, or all of it be asked for."""
    change_metadata(folder, lambda metadata: craft(metadata.state_dict_metadata["model.a"]))
    with pytest.raises(UserError, match="is damaged"):
        read_tensors(folder)


def test_crafted_tensor_in_a_shard_is_refused_before_it_runs(folder, tmp_path):
    """The piece of a tensor, replaced by a pickle that runs code."""
    info = next(info for index, info in read_metadata(folder).storage_data.items() if index.fqn == "model.a")
    payload = io.BytesIO()
    torch.save(Attack(tmp_path / "ran"), payload)
    shard = folder / info.relative_path
    contents = bytearray(shard.read_bytes())
    offset = len(contents)
    shard.write_bytes(contents + payload.getvalue())

    def point_at_it(metadata):
        for index, place in metadata.storage_data.items():
            if index.fqn == "model.a":
                place.offset, place.length = offset, len(payload.getvalue())

    change_metadata(folder, point_at_it)
    with pytest.raises(UserError, match="Cannot load"):
        read_tensors(folder)
    assert not (tmp_path / "ran").exists()


def test_damage_is_named(folder):
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"incomplete: __0_0\.distcp"):
        read_tensors(folder)
    metadata = folder / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        read_tensors(folder)
    metadata.unlink()
    with pytest.raises(UserError, match="not a readable checkpoint folder"):
        read_tensors(folder)


def test_missing_entry_is_named(folder):
    with pytest.raises(UserError, match="absent"):
        safe_load({"absent": torch.zeros(1)}, SafeFileSystemReader(folder), no_dist=True)
