"""Files of a run or of weights that a stranger has made: nothing in them is executed, nothing is written elsewhere."""

import contextlib
import json
import os
import shutil
import struct
import zipfile

import pytest
import torch

from grpo.checkpoint.folders import read_run_file
from grpo.config import UserError
from grpo.formats import file_sums, manifest_text, read_config, read_manifest, read_weights
from grpo.parallel import distributed
from tests.checkpoint.training import managed, save, start


class Attack:
    """Unpickling it makes a folder named after its target."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def world():
    with distributed(60) as world:
        yield world


@pytest.fixture(scope="module")
def honest(world, tmp_path_factory):
    """A checkpoint of a run, with its weights in one file."""
    folder = tmp_path_factory.mktemp("honest")
    with managed(folder, world, sharded=False) as manager:
        save(manager, start(world), 1)
    return folder / "step-000001"


def sign(folder):
    """Make the manifest fit the files, as whoever crafts a folder would."""
    files = [folder / name for name in read_manifest(folder)]
    (folder / "manifest.json").write_text(manifest_text(file_sums(files)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "manifest.json", "run_state.json"])
def test_what_is_no_file_is_not_read(world, honest, tmp_path, kind, name):
    """A pipe would never end, a link lead out of the folder; as a checkpoint and as weights."""
    folder = tmp_path / "step-000001"
    shutil.copytree(honest, folder)
    (folder / name).rename(tmp_path / "elsewhere")
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}.* it is a link or no file"):
        read_config(folder) if name == "run_state.json" else read_weights(folder)
    with managed(tmp_path, world) as manager, pytest.raises(UserError, match=r"link or no file|missing or cut"):
        manager.named(folder)


def test_crafted_consolidated_weights(honest, tmp_path):
    folder = tmp_path / "step-000001"
    shutil.copytree(honest, folder)
    torch.save({"model": {"a": torch.ones(1), "b": Attack(tmp_path / "ran")}}, folder / "consolidated.pth")
    sign(folder)
    assert read_weights(folder)  # from the shards
    for shard in folder.glob("shard-*"):
        shard.unlink()
    with pytest.raises(UserError, match="refused, reading it could run code"):
        read_weights(folder)
    assert not (tmp_path / "ran").exists()


def test_an_archive_whose_members_lie_outside(honest, tmp_path):
    """A .pth is a zip archive: its members are read by name, never unpacked."""
    path = tmp_path / "deep" / "down" / "weights.pth"
    path.parent.mkdir(parents=True)
    shutil.copy(honest / "consolidated.pth", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("/escaped-too", "x")
    before = set(tmp_path.rglob("*"))
    with contextlib.suppress(UserError):  # torch may refuse members without the archive's prefix, or pass over them
        assert read_weights(path).keys() == read_weights(honest / "consolidated.pth").keys()
    assert set(tmp_path.rglob("*")) == before
    assert not os.path.exists("/escaped-too")


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "contents",
    [
        struct.pack("<Q", 2**60) + b"{}",
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
        header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}) + b"1234",
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + b"1234",
        header(a={"dtype": "O", "shape": [1], "data_offsets": [0, 4]}) + b"1234",
        struct.pack("<Q", 4) + b"\x80\x04N.",
    ],
    ids=["endless header", "no data", "larger than its data", "negative offset", "objects", "a pickle"],
)
def test_crafted_safetensors(tmp_path, contents):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"not a readable \.safetensors file"):
        read_weights(path)


@pytest.mark.parametrize(
    "text",
    ['{"../../x": {"size": 1, "sha256": ""}}', "[1]", '{"a": 1}', "\x00", "9" * 5000, " " * 2**26 + "{}"]
    + [f'{{"a": {{"size": {size}, "sha256": ""}}}}' for size in ("1e400", "true", '"1"', "null")],
)
def test_crafted_manifest(world, honest, tmp_path, text):
    folder = tmp_path / "step-000001"
    shutil.copytree(honest, folder)
    (folder / "manifest.json").write_text(text)
    with managed(tmp_path, world) as manager:
        assert "manifest.json" in manager.damage(folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["manifest.json", "run_state.json", "shard"])
def test_pipes_are_not_waited_for(world, honest, tmp_path, name):
    """Neither where a run goes on from the folder, nor where it is used as weights."""
    folder = tmp_path / "step-000001"
    shutil.copytree(honest, folder)
    file = next(folder.glob(f"{name}*"))
    file.unlink()
    os.mkfifo(file)
    with managed(tmp_path, world) as manager:
        if name == "manifest.json":
            with pytest.raises(UserError, match="a link or no file"):
                manager.damage(folder)
        else:
            assert "is incomplete" in manager.damage(folder)
    with pytest.raises(UserError, match="a link or no file"):
        (read_run_file if name == "run_state.json" else read_weights)(folder)


@pytest.mark.parametrize("score", ["9" * 400, "true", "NaN"])
def test_crafted_scores_do_not_end_saving(world, tmp_path, score):
    with managed(tmp_path, world, keep_last=1, keep_best=1) as manager:
        save(manager, start(world), 1, score=1.0)
        file = tmp_path / "step-000001" / "run_state.json"
        file.write_text(file.read_text().replace('"score": 1.0', f'"score": {score}'))
        sign(tmp_path / "step-000001")
        save(manager, start(world), 2, score=0.5)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000002"}
