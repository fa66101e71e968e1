"""Checkpoints behind URLs: fsspec's file systems in memory and on disk, and S3 by a local server if it is installed."""

import importlib.util
import json
import uuid

import fsspec
import pytest

from grpo.checkpoint import folders
from grpo.config import TransientError, UserError
from grpo.parallel import distributed
from tests.checkpoint.training import Extra, managed, same, save, start, train, whole_state
from tests.parallel.torchrun import run_two_ranks

S3_PARTS = ("moto.server", "s3fs", "flask")


@pytest.fixture(scope="module")
def world():
    with distributed(60) as world:
        yield world


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The address of an S3 server in this process, with the bucket `runs`."""
    if missing := [name for name in S3_PARTS if importlib.util.find_spec(name.partition(".")[0]) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        home = tmp_path_factory.mktemp("home")
        for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "HOME": str(home),
                            "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("runs")
        yield
        server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def place(request, tmp_path):
    """An empty place in each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://runs/{uuid.uuid4().hex}/checkpoints"
    return f"memory://{uuid.uuid4().hex}/checkpoints" if request.param == "memory" else f"file://{tmp_path}/store"


def files(place):
    """What is there: names under it, with sizes."""
    system, root = fsspec.url_to_fs(place)
    system.invalidate_cache()
    return {path[len(root) :].strip("/"): entry["size"] for path, entry in system.find(root, detail=True).items()}


def change(place, name, contents):
    """Overwrite a file, or with None remove it."""
    system, root = fsspec.url_to_fs(place)
    system.pipe_file(f"{root}/{name}", contents) if contents is not None else system.rm_file(f"{root}/{name}")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_goes_on_from_there(world, tmp_path, place, async_save):
    stage = tmp_path / "stage"
    training = start(world)
    train(world, training, range(3))
    with managed(place, world, stage=stage, async_save=async_save, sharded=False) as manager:
        manager.check_writable()
        assert manager.resume_point() is None
        save(manager, training, 3, mean=Extra(training[0], 3.0))
        expected = whole_state(training)
        norms = train(world, training, range(3, 5))
    assert not any(stage.glob("*/*"))
    names = {"shard-00001-model-00001-of-00001.safetensors", "run_state.json", "resume_step.txt", "state_type.txt",
             "consolidated.pth", "manifest.json"}  # fmt: skip
    assert files(place).keys() == {f"step-000003/{name}" for name in names}

    again = start(world)
    with managed(place, world, stage=stage) as manager:
        path, found = manager.resume_point(), Extra(again[0], 0.0)
        assert manager.place_of(path) == f"{place}/step-000003"
        assert manager.read_run_state(path)["step"] == 3
        manager.load(path, model=again[0], optimizer=again[1], extra={"mean": found})
        assert not path.exists()  # the stage is empty again
        with pytest.raises(UserError, match="step-000003 exists and is not overwritten"):
            save(manager, again, 3)
    assert found.equals(Extra(again[0], 3.0))
    assert same(whole_state(again), expected)
    assert train(world, again, range(3, 5)) == norms


def test_what_is_damaged_or_unfinished_is_passed_over(world, tmp_path, place):
    training, lines = start(world), []
    with managed(place, world, stage=tmp_path) as manager:
        for step in (1, 2, 3, 4):
            save(manager, training, step)
        shard = next(name for name in files(place) if name.startswith("step-000003/shard"))
        change(place, shard, b"x" * files(place)[shard])
        change(place, "step-000002/resume_step.txt", None)
        change(place, "step-000004/manifest.json", None)  # as if its writer had been killed before the last file
        path = manager.resume_point(lines.append)
        assert manager.place_of(path) == f"{place}/step-000001"
        assert [line.partition(" is ")[0] for line in lines] == [f"{place}/step-00000{step}" for step in (3, 2)]
        assert "changed since it was written; renamed to step-000003.damaged" in lines[0]
        assert "incomplete: resume_step.txt missing" in lines[1]
        save(manager, training, 4)  # what the killed one has left goes
        assert folders.step_of(manager.resume_point()) == 4
    kept = {name.partition("/")[0] for name in files(place)}
    assert kept == {"step-000001", "step-000002.damaged", "step-000003.damaged", "step-000004"}


def test_old_ones_go(world, tmp_path, place):
    training = start(world)
    with managed(place, world, stage=tmp_path, keep_last=1, keep_best=1) as manager:
        for step, score in {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.2}.items():
            save(manager, training, step, score)
    assert {name.partition("/")[0] for name in files(place)} == {"step-000002", "step-000004"}
    system, root = fsspec.url_to_fs(place)
    if place.startswith("file"):
        assert len(system.ls(root)) == 2  # no empty folders


def test_a_named_one_of_another_run(world, tmp_path, place):
    with managed(place, world, stage=tmp_path / "stage") as manager:
        save(manager, start(world), 7)
    again = start(world)
    with managed(tmp_path / "own", world, stage=tmp_path / "stage") as manager:
        path = manager.named(f"{place}/step-000007/")
        assert manager.place_of(path) == f"{place}/step-000007"
        with pytest.raises(UserError, match=f"{place}/step-000007 is a checkpoint of another recipe") as error:
            manager.load(path, model=again[0], optimizer=again[1], extra={"mean": Extra(again[0], 0.0)})
        assert "stage" not in str(error.value)  # where a user has nothing to look for
        manager.load(path, model=again[0], optimizer=again[1])
        change(place, "step-000007/state_type.txt", None)
        with pytest.raises(UserError, match=r"checkpoint\.resume: .*step-000007 is incomplete: state_type\.txt"):
            manager.named(f"{place}/step-000007")


def test_an_upload_that_fails_leaves_no_checkpoint(world, tmp_path, place, monkeypatch):
    training = start(world)
    with managed(place, world, stage=tmp_path) as manager:
        save(manager, training, 1)
        put = manager.storage._fs.put_file

        def fail(source, target, **options):
            if "run_state" in source:
                raise ConnectionError("the store is gone")
            return put(source, target, **options)

        monkeypatch.setattr(manager.storage._fs, "put_file", fail)
        with pytest.raises(
            TransientError, match=r"step 2 could not be written to .*run_state\.json: the store is gone"
        ):
            save(manager, training, 2)
        monkeypatch.undo()
        assert folders.step_of(manager.resume_point()) == 1
        save(manager, training, 2)
        assert folders.step_of(manager.resume_point()) == 2


def test_a_store_that_does_not_answer_condemns_nothing(world, tmp_path, place, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("the store is gone")

    with managed(place, world, stage=tmp_path) as manager:
        save(manager, start(world), 1)
        for name in ("cat_file", "get_file", "find"):
            with monkeypatch.context() as patch:
                patch.setattr(manager.storage._fs, name, fail)
                with pytest.raises(TransientError, match="the store is gone"):
                    manager.resume_point()
        assert folders.step_of(manager.resume_point()) == 1


def test_errors_of_s3_are_one_line(world, tmp_path, s3, monkeypatch):
    with managed("s3://no-such-bucket/run", world, stage=tmp_path) as manager:
        with pytest.raises(UserError, match=r"cannot be written to s3://no-such-bucket/run: .*bucket") as error:
            manager.check_writable()
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="bucket does not exist"):  # no reason to start anew
            manager.resume_point()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with managed("s3://runs/x", world, stage=tmp_path) as manager, pytest.raises(UserError, match="credentials"):
        manager.check_writable()


@pytest.mark.parametrize(("url", "told"), [("nonsense://x/y", "nonsense"), ("gcs://x/y", "gcsfs")])
def test_a_store_that_nobody_knows(world, tmp_path, url, told):
    with pytest.raises(UserError, match=told), managed(url, world, stage=tmp_path):
        pass


def test_two_ranks_of_two_hosts(world, tmp_path):
    """Each host has a stage of its own; rank 0 brings the other's shard for the weights in one file."""
    result = run_two_ranks("tests/checkpoint/two_stages.py", tmp_path)
    assert result.returncode == 0, result.stderr
    with managed(f"file://{tmp_path}/store", world, stage=tmp_path / "third") as manager:
        again, path = start(world), manager.resume_point()
        assert json.loads((path / "run_state.json").read_text())["world_size"] == 2
        manager.load(path, model=again[0], optimizer=again[1])
        assert {name.partition("/")[2][:8] for name in files(f"file://{tmp_path}/store")} >= {"shard-00", "consolid"}
