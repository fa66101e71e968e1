import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from grpo.checkpoint import folders
from grpo.checkpoint.storage import LocalFolder
from grpo.config import Checkpoint, TransientError, UserError
from grpo.parallel import distributed
from tests.checkpoint.documented import read_as_documented
from tests.checkpoint.training import Extra, managed, same, save, start, train, whole_state
from tests.parallel.torchrun import ROOT, run_two_ranks

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def world():
    with distributed(60) as world:
        yield world


@pytest.mark.parametrize("mixed_precision", ["fp32", "bf16"])  # plain and FSDP2 parameters
@pytest.mark.parametrize("async_save", [False, True])
def test_continued_run_is_bit_equal(world, tmp_path, async_save, mixed_precision):
    torch.manual_seed(1)
    training = start(world, mixed_precision=mixed_precision)
    train(world, training, range(3))
    with managed(tmp_path, world, async_save=async_save) as manager:
        save(manager, training, 3)
        norms = train(world, training, range(3, 6))
        expected = whole_state(training)

        torch.manual_seed(2)
        again = start(world, mixed_precision=mixed_precision)
        path = manager.resume_point()
        assert manager.read_run_state(path) == {"step": 3, "thirds": [1.0]}
        manager.load(path, model=again[0], optimizer=again[1])
    assert train(world, again, range(3, 6)) == norms
    assert same(whole_state(again), expected)


def test_saving_before_the_first_step_changes_nothing(world, tmp_path):
    torch.manual_seed(1)
    expected = start(world)
    train(world, expected, range(2))
    torch.manual_seed(1)
    training = start(world)
    with managed(tmp_path, world) as manager:
        save(manager, training, 0)
        train(world, training, range(2))
        assert same(whole_state(training), whole_state(expected))
        again = start(world)
        manager.load(manager.resume_point(), model=again[0], optimizer=again[1])
        train(world, again, range(2))
        assert same(whole_state(again), whole_state(expected))


def test_number_of_ranks_may_change(world, tmp_path):
    training = start(world)
    train(world, training, range(3))
    with managed(tmp_path / "one", world) as manager:
        save(manager, training, 3, mean=Extra(training[0], 3.0))
    torch.save(whole_state(training), tmp_path / "one.pth")

    result = run_two_ranks("tests/checkpoint/reshard.py", tmp_path)
    assert result.returncode == 0, result.stderr

    with managed(tmp_path / "two", world) as manager:
        path = manager.resume_point()
        found = Extra(training[0], 0.0)
        assert manager.load(path, model=training[0], optimizer=training[1], extra={"mean": found}) is None
        assert found.equals(Extra(training[0], 5.0))
        with pytest.raises(UserError, match=r"another recipe: it has extra\.mean\.replicated"):
            manager.load(path, model=training[0], optimizer=training[1])
    expected = torch.load(tmp_path / "two.pth")
    assert same(whole_state(training), expected)
    consolidated = torch.load(path / "consolidated.pth", weights_only=True)["model"]
    assert same(consolidated, {name: value for name, value in expected.items() if not name.startswith("state.")})
    documented = {
        f"{'optimizer' if name.startswith('state.') else 'model'}.{name}": expected[name] for name in expected
    }
    documented |= {f"extra.mean.{name}": tensor for name, tensor in found.tensors.items()}
    read = {name: torch.from_numpy(tensor) for name, tensor in read_as_documented(path).items()}
    assert same(read, documented)


@pytest.mark.parametrize(("sharded", "state_type"), [(True, "sharded"), (False, "full")])
def test_files(world, tmp_path, sharded, state_type):
    with managed(tmp_path, world, sharded=sharded) as manager:
        save(manager, start(world), 100)
    path = tmp_path / "step-000100"
    assert [*tmp_path.iterdir()] == [path]
    names = {
        SHARD,
        "run_state.json",
        "resume_step.txt",
        "state_type.txt",
    }
    names.add("manifest.json")
    assert {file.name for file in path.iterdir()} == names | (set() if sharded else {"consolidated.pth"})
    assert (path / "state_type.txt").read_text().strip() == state_type
    assert (path / "resume_step.txt").read_text().strip() == "100"


def test_only_complete_folders_count(world, tmp_path):
    training = start(world)
    with managed(tmp_path, world) as manager:
        assert manager.resume_point() is None
        for step in (1, 2, 3, 4):
            save(manager, training, step)
        (tmp_path / "step-000004" / "run_state.json").unlink()
        cut_short(tmp_path / "step-000003" / SHARD)
        (tmp_path / "step-000005").mkdir()
        (tmp_path / "step-latest").mkdir()
        shutil.copytree(tmp_path / "step-000001", tmp_path / folders.partial_name(6))
        with pytest.raises(UserError, match="step-000003 cannot be read"):
            manager.load(tmp_path / "step-000003", model=training[0], optimizer=training[1])
        lines = []
        assert manager.resume_point(lines.append) == tmp_path / "step-000002"
    assert [line.partition(" ")[0] for line in lines] == [str(tmp_path / f"step-00000{step}") for step in (5, 4, 3)]
    assert "manifest.json: No such file" in lines[0]
    assert "run_state.json missing or cut short; renamed to step-000004.damaged" in lines[1]
    assert f"{SHARD} missing or cut short" in lines[2]


FILES = (SHARD, "run_state.json", "resume_step.txt", "state_type.txt",
         "consolidated.pth", "manifest.json")  # fmt: skip


@pytest.mark.parametrize("harm", ["flip_bit", "cut_short", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_found_and_the_one_before_taken(saved_three, tmp_path, world, name, harm):
    copy = tmp_path / "checkpoints"
    shutil.copytree(saved_three, copy)
    {"flip_bit": flip_bit, "cut_short": cut_short, "remove": Path.unlink}[harm](copy / "step-000003" / name)
    lines = []
    with managed(copy, world) as manager:
        assert manager.damage(copy / "step-000003") is not None
        assert manager.resume_point(lines.append) == copy / "step-000002"
        (line,) = lines
        assert str(copy / "step-000003") in line
        assert name in line or (name, harm) == ("manifest.json", "flip_bit")  # which then wrongs another file
        training = start(world)
        save(manager, training, 3)  # its place is free again
        assert manager.resume_point() == copy / "step-000003"
    assert {path.name for path in copy.iterdir()} == {f"step-00000{n}" for n in (1, 2, 3)} | {"step-000003.damaged"}


@pytest.fixture(scope="module")
def saved_three(world, tmp_path_factory):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with managed(folder, world, sharded=False) as manager:
        for step in (1, 2, 3):
            save(manager, start(world), step)
    return folder


def flip_bit(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def test_a_manifest_that_names_files_elsewhere_is_not_trusted(saved_three, tmp_path, world):
    copy = tmp_path / "step-000001"
    shutil.copytree(saved_three / "step-000001", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("../../secret", "/etc/passwd", ".."):
        (copy / "manifest.json").write_text(json.dumps({**manifest, name: {"size": 1, "sha256": "0"}}))
        with managed(tmp_path, world) as manager:
            assert "do not trust" in manager.damage(copy)


def test_keeps_the_newest(world, tmp_path):
    training = start(world)
    with managed(tmp_path, world, keep_last=2) as manager:
        for step in (1, 2, 9, 3):  # a run that went back to step 2 keeps what it writes
            save(manager, training, step)
            assert manager.resume_point() is not None
    assert {path.name for path in tmp_path.iterdir()} == {"step-000009", "step-000003"}


@pytest.mark.parametrize(("best_is", "kept"), [("highest", {2, 4, 6, 7}), ("lowest", {1, 3, 6, 7})])
def test_keeps_the_best_besides_the_newest(world, tmp_path, best_is, kept):
    training = start(world)
    scores = {1: 0.1, 2: 0.9, 3: -0.5, 4: 0.8, 5: None, 6: 0.7, 7: float("nan")}
    with managed(tmp_path, world, keep_last=2, keep_best=2, best_is=best_is) as manager:
        for step, score in scores.items():
            save(manager, training, step, score)
    assert {int(path.name[-6:]) for path in tmp_path.iterdir()} == kept


def test_nothing_is_deleted_for_a_checkpoint_that_is_not_whole(world, tmp_path):
    training = start(world)
    with managed(tmp_path, world) as manager:
        for step in (1, 2):
            save(manager, training, step)
    cut_short(tmp_path / "step-000002" / SHARD)
    LocalFolder(tmp_path).remove_old(Checkpoint(keep_last=1), newest="step-000002")
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000002"}


def test_an_old_checkpoint_that_is_a_link_does_not_end_saving(world, tmp_path):
    """The link goes, what it leads to stays."""
    training, folder, elsewhere = start(world), tmp_path / "run", tmp_path / "archive"
    with managed(folder, world, keep_last=1) as manager:
        save(manager, training, 1)
        (folder / "step-000001").rename(elsewhere)
        (folder / "step-000001").symlink_to(elsewhere)
        for step in (2, 3):
            save(manager, training, step)
    assert {path.name for path in folder.iterdir()} == {"step-000003"}
    assert (elsewhere / "manifest.json").exists()


def test_a_folder_that_cannot_be_looked_at_is_not_condemned(world, tmp_path, monkeypatch):
    def unreadable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with managed(tmp_path, world) as manager:
        save(manager, start(world), 1)
        with monkeypatch.context() as patch:
            patch.setattr("grpo.formats.manifest.open_file", unreadable)
            with pytest.raises(TransientError, match=r"step-000001 cannot be read: .*nothing was changed"):
                manager.resume_point()
        assert manager.resume_point() == tmp_path / "step-000001"


def test_old_ones_that_cannot_be_removed_do_not_end_saving(world, tmp_path, monkeypatch, caplog):
    def refuse(storage, name):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(LocalFolder, "delete", refuse)
    with managed(tmp_path, world, keep_last=1) as manager:
        for step in (1, 2):
            save(manager, start(world), step)
        assert manager.resume_point() == tmp_path / "step-000002"
    assert "could not be removed" in caplog.text


def test_weights_in_one_file_of_either_format(world, tmp_path):
    model, optimizer = start(world)
    with managed(tmp_path, world, sharded=False, safetensors=True) as manager:
        save(manager, (model, optimizer), 1)
    folder = tmp_path / "step-000001"
    expected = {name: tensor.cpu() for name, tensor in whole_state((model, optimizer)).items() if name[:6] != "state."}
    assert same(torch.load(folder / "consolidated.pth", weights_only=True)["model"], expected)
    assert same(safetensors.torch.load_file(folder / "consolidated.safetensors"), expected)


def test_an_existing_checkpoint_is_not_overwritten(world, tmp_path):
    training = start(world)
    with managed(tmp_path, world) as manager:
        save(manager, training, 1)
        before = {file: file.read_bytes() for file in (tmp_path / "step-000001").iterdir()}
        with pytest.raises(UserError, match="exists and is not overwritten"):
            save(manager, training, 1)
    assert {file: file.read_bytes() for file in (tmp_path / "step-000001").iterdir()} == before


def test_too_little_space_is_told_before_anything_is_written(world, tmp_path, monkeypatch):
    training = start(world)
    with managed(tmp_path, world, sharded=False, safetensors=True) as manager:
        save(manager, training, 1)
        weights = sum(tensor.numel() * 4 for tensor in training[0].parameters())
        needed = sum(file.stat().st_size for file in (tmp_path / "step-000001").iterdir())
        assert 5 * weights <= needed < 5.5 * weights  # with both moments, and both files of all weights

        def usage(place):
            assert place == tmp_path
            return shutil._ntuple_diskusage(0, 0, free)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        free = 5 * weights - 4
        with pytest.raises(TransientError, match=r"step 2 .*GiB are free in .* and it takes about .*GiB; free space"):
            save(manager, training, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        free = needed
        save(manager, training, 2)


@pytest.mark.parametrize("async_save", [False, True])
def test_full_disk(world, tmp_path, monkeypatch, async_save):
    def no_space(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_and_wait(manager, step):
        save(manager, training, step)
        manager.wait()

    training = start(world)
    with managed(tmp_path, world, async_save=async_save) as manager:
        save_and_wait(manager, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(UserError, match=r"step 2 could not be written .*No space left.*free space"):
                save_and_wait(manager, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        save_and_wait(manager, 2)  # once there is space again
        assert manager.resume_point() == tmp_path / "step-000002"


def test_a_killed_writer_leaves_nothing_that_counts(world, tmp_path):
    killed = subprocess.run([sys.executable, "-m", "tests.checkpoint.killed_writer", tmp_path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", ".step-000002.partial"}
    training = start(world)
    with managed(tmp_path, world) as manager:
        assert manager.resume_point() == tmp_path / "step-000001"
        save(manager, training, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000002"}


def test_a_folder_that_cannot_be_made(world, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        managed(tmp_path / "file" / "checkpoints", world) as manager,
        pytest.raises(UserError, match=r"could not be written to .*Not a directory"),
    ):
        save(manager, start(world), 1)


def test_a_checkpoint_of_another_model_is_refused(world, tmp_path):
    model, optimizer = start(world)
    with managed(tmp_path, world) as manager:
        save(manager, (model, optimizer), 1)
        model.layers = model.layers[:2]
        smaller = torch.optim.AdamW(model.parameters())
        with pytest.raises(UserError, match=r"another model: it has model\.layers\.2"):
            manager.load(tmp_path / "step-000001", model=model, optimizer=smaller)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_small_file_is_named(world, tmp_path, text):
    training = start(world)
    with managed(tmp_path, world) as manager:
        save(manager, training, 1)
        (tmp_path / "step-000001" / "run_state.json").write_text(text)
        with pytest.raises(UserError, match=r"run_state\.json"):
            manager.load(tmp_path / "step-000001", model=training[0], optimizer=training[1])
