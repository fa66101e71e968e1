"""Folders of safetensors shards, honest and crafted."""

import itertools
import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo.config import UserError
from grpo.formats import ShardReader, file_sums, load_shards, manifest_text, read_tensors, read_weights, write_shards
from grpo.formats.shards import tiles

TENSORS = {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(())}


@pytest.fixture
def folder(tmp_path):
    write_shards(path := tmp_path / "checkpoint", TENSORS)
    return path


def craft(folder, number: int, pieces: dict[str, tuple[Tensor, object]]) -> None:
    """Write a shard whose tensors claim to belong at these places."""
    places = json.dumps({name: {"saved_offsets": place} for name, (_, place) in pieces.items()})
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor for name, (tensor, _) in pieces.items()}
    file = folder / f"shard-{number:05d}-model-00001-of-00001.safetensors"
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": places})


def test_a_checkpoint_that_lacks_a_shard_gives_no_weights(tmp_path):
    """Without the last one, tensors look whole and are shorter: only the manifest knows."""
    for number in (1, 2):
        craft(tmp_path, number, {"model.a": (torch.full((2, 3), float(number)), [2 * number - 2, 0])})
    files = sorted(tmp_path.glob("*.safetensors"))
    (tmp_path / "manifest.json").write_text(manifest_text(file_sums(files)))
    assert read_weights(tmp_path)["a"].shape == (4, 3)
    for gone in files:
        content = gone.read_bytes()
        gone.unlink()
        with pytest.raises(UserError, match=f"is damaged: {gone.name} missing"):
            read_weights(tmp_path)
        gone.write_bytes(content)


def test_reads_whole_tensors_under_a_prefix(folder):
    loaded = read_tensors(folder, prefix="model.")
    assert loaded.keys() == {"a", "b"}
    assert all(torch.equal(loaded[name], TENSORS[f"model.{name}"]) for name in loaded)
    assert read_tensors(folder)["c"] == 1


def test_reads_what_the_library_wrote_on_one_rank_and_whole_files_of_others(tmp_path):
    dcp.save(dict(TENSORS), storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "one")), no_dist=True)
    (tmp_path / "two").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "two/model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two/model-00002-of-00002.safetensors")
    assert read_tensors(tmp_path / "one").keys() == TENSORS.keys()
    assert read_tensors(tmp_path / "two").keys() == {"a", "b"}


def test_pieces_are_put_together(tmp_path):
    craft(tmp_path / "x", 1, {"a": (torch.zeros(2, 2), [0, 0]), "b": (torch.zeros(1), [0])})
    craft(tmp_path / "x", 2, {"a": (torch.ones(1, 2), [2, 0])})
    assert torch.equal(read_tensors(tmp_path / "x")["a"], torch.tensor([[0.0, 0], [0, 0], [1, 1]]))


@pytest.mark.parametrize(
    ("second", "place"),
    [
        ((1, 2), [1, 0]),  # over the first piece
        ((1, 2), [3, 0]),  # a row is left out
        ((1, 1), [2, 0]),  # half a row
        ((1, 2), [10**15, 0]),  # far away
        ((2, 2), [0, 0]),  # the same again
        ((1, 2), [-1, 0]),
        ((1, 2), [2]),
        ((1, 2), ["2", None]),
        ((1, 2), 10**30),
        ((1,), [2]),
    ],
)
def test_tensors_that_are_not_stored_once_and_whole_are_refused(tmp_path, second, place):
    """Else memory that nobody wrote would be taken for weights, or all of it be asked for."""
    craft(tmp_path / "x", 1, {"a": (torch.zeros(2, 2), [0, 0])})
    craft(tmp_path / "x", 2, {"a": (torch.ones(second), place)})
    with pytest.raises(UserError, match="is damaged"):
        read_tensors(tmp_path / "x")


def test_tiles_equals_painting_every_element():
    size = (3, 2)
    boxes = [
        ((x, y), (w, h))
        for x, y, w, h in itertools.product(range(3), range(2), range(1, 4), range(1, 3))
        if x + w <= 3 and y + h <= 2
    ]
    for count in (1, 2, 3):
        for pieces in itertools.combinations_with_replacement(boxes, count):
            painted = torch.zeros(size)
            for (x, y), (w, h) in pieces:
                painted[x : x + w, y : y + h] += 1
            assert tiles(size, pieces) == bool((painted == 1).all()), pieces
    assert tiles((), [((), ())])
    assert not tiles((), [((), ()), ((), ())])
    assert tiles((0, 2), [])


class Attack:
    """Unpickling it makes a folder named after its target."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickled_metadata_is_never_read(folder, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    assert read_tensors(folder).keys() == TENSORS.keys()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(UserError, match="behind a pickle"):
        read_tensors(folder)
    assert not (tmp_path / "ran").exists()


def test_links_and_pipes_are_refused(folder, tmp_path):
    shard = next(folder.glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is a link or no file"):
        read_tensors(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match="is a link or no file"):
        read_tensors(folder)


def test_damage_is_told(folder):
    shard = next(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    for contents in (b"", whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"[" * 100 + whole[108:]):
        shard.write_bytes(contents)
        with pytest.raises(UserError, match="cannot be read"):
            read_tensors(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        read_tensors(folder)


@pytest.mark.parametrize(
    ("name", "tensor"), [("d", torch.ones(2)), ("model.a", torch.ones(3, 2)), ("c", torch.ones(1))]
)
def test_what_is_not_there_cannot_be_loaded(folder, name, tensor):
    with pytest.raises(UserError, match="Cannot load"):
        load_shards({name: tensor}, ShardReader(folder), alone=True)


def test_files_say_how_they_can_be_read(folder):
    """By everyone, not by their owner alone; and the places of the pieces are in them."""
    shard = next(folder.glob("*.safetensors"))
    (folder / "probe").touch()
    assert shard.stat().st_mode == (folder / "probe").stat().st_mode
    with safe_open(shard, framework="pt") as file:
        assert json.loads(file.metadata()["DCP_SHARDING_INFO"])["c"] == {"saved_offsets": []}


def test_checksums_of_a_checkpoint_are_compared_when_it_is_used_as_weights(folder):
    shard = next(folder.glob("*.safetensors"))
    (folder / "manifest.json").write_text(manifest_text(file_sums([shard])))
    assert read_weights(folder).keys() == {"a", "b"}
    contents = bytearray(shard.read_bytes())
    contents[-1] ^= 1
    shard.write_bytes(contents)
    with pytest.raises(UserError, match=f"{shard.name} changed since it was written"):
        read_weights(folder)
    save_file({"other": torch.ones(1)}, folder / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="is not in its manifest"):
        read_weights(folder)
