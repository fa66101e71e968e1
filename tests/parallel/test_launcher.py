import os
import subprocess
import sys

import pytest
import torch

from grpo.config import TransientError, UserError
from grpo.parallel import distributed, launcher, run_main
from tests.parallel.torchrun import run_two_ranks


class Exit(BaseException):
    """Stands in for the end of the process."""


def exit_code(monkeypatch, error: BaseException | None) -> int:
    def main(arguments):
        assert arguments == ["--a", "b"]
        if error is not None:
            raise error

    def leave(code):
        raise Exit(code)

    # A group that an earlier test has left would take part in deciding who reports.
    monkeypatch.setattr(sys.modules["grpo.parallel.distributed"], "_store", None)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--a", "b"])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises((Exit, SystemExit)) as info:
        run_main(main)
    return info.value.args[0]


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (SystemExit(0), 0), (SystemExit(2), 2), (SystemExit("usage"), 1), (KeyboardInterrupt(), 130)],
)
def test_quiet_ends(monkeypatch, capfd, error, code):
    assert exit_code(monkeypatch, error) == code
    assert capfd.readouterr() == ("", "")


def test_streams_that_a_users_code_has_closed(monkeypatch):
    with open(os.devnull, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
    assert exit_code(monkeypatch, None) == 0


def test_whoever_reads_may_have_seen_enough():
    code = "from grpo.parallel import run_main; run_main(lambda _: print('much'))"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_user_error_is_plain_lines(monkeypatch, capfd):
    assert exit_code(monkeypatch, UserError(["one", "two"])) == 2
    assert capfd.readouterr().err == "one\ntwo\n"


def test_who_is_not_ended_with_rank_zero_speaks_for_itself(monkeypatch, capfd):
    monkeypatch.setattr(launcher, "_ALONE_SECONDS", 0.1)
    monkeypatch.setenv("RANK", "1")
    assert exit_code(monkeypatch, UserError("one")) == 2
    assert capfd.readouterr().err == f"rank 1 on {os.uname().nodename}: one\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line_of_advice(monkeypatch, capfd, error):
    assert exit_code(monkeypatch, error) == 2
    line, end = capfd.readouterr().err.split("\n")
    assert "ran out of memory" in line
    assert "training.micro_batch_size, rollout.max_rows or reward.batch_size" in line
    assert end == ""


@pytest.fixture
def torchrun_folder(monkeypatch, tmp_path):
    """The folder of one torchrun's ranks on this host; this process is one of them."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "run_abc/attempt_0/0/error.json"))
    (tmp_path / "run_abc/attempt_0/0").mkdir(parents=True)
    return tmp_path / "run_abc"


def test_a_restart_after_a_mistake_says_nothing(monkeypatch, capfd, torchrun_folder):
    assert exit_code(monkeypatch, UserError("one")) == 2
    assert capfd.readouterr().err == "one\n"
    assert exit_code(monkeypatch, UserError("a slower rank of the same start")) == 2
    assert capfd.readouterr().err == "a slower rank of the same start\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(torchrun_folder / "attempt_1/0/error.json"))
    assert exit_code(monkeypatch, AssertionError("is not run")) == 2
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(torchrun_folder.with_name("run_def") / "attempt_0/0/error.json"))
    assert exit_code(monkeypatch, UserError("another torchrun")) == 2
    assert capfd.readouterr().err == "another torchrun\n"


@pytest.mark.parametrize(
    "error", [TransientError("no room"), MemoryError(), OSError(28, "No space left"), ValueError()]
)
def test_a_restart_after_anything_else_tries_again(monkeypatch, capfd, torchrun_folder, error):
    exit_code(monkeypatch, error)
    capfd.readouterr()
    assert exit_code(monkeypatch, None) == 0


def test_a_fault_keeps_its_traceback(monkeypatch, capfd):
    assert exit_code(monkeypatch, ZeroDivisionError("here")) == 1
    assert "Traceback" in (text := capfd.readouterr().err)
    assert "ZeroDivisionError: here" in text


def test_alone_is_a_group_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):  # the group goes with the block
        with distributed(60) as world:
            assert (world.rank, world.size, world.local_size, world.is_main) == (0, 1, 1, True)
            assert torch.distributed.get_world_size() == 1
        assert not torch.distributed.is_initialized()


def test_error_of_one_rank_is_told_once_and_nobody_hangs():
    result = run_two_ranks("tests/parallel/failing.py", "rank 1 alone", restarts=2)  # which end at once
    assert result.returncode == 1
    assert result.stderr.count("first line\nsecond line\n") == 1
    assert "grpo/parallel/launcher.py" not in result.stderr  # no traceback but torchrun's own


def test_a_problem_of_one_rank_before_the_group_is_up_is_told():
    result = run_two_ranks("tests/parallel/failing.py", "rank 1 early")
    assert result.returncode == 1
    assert result.stderr.count(f"rank 1 on {os.uname().nodename}: only here\n") == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "abc"},
        {"RANK": "--1"},
        {"WORLD_SIZE": "9" * 5000},
        {"WORLD_SIZE": "0"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"LOCAL_RANK": "5"},
        {"WORLD_SIZE": "1e3"},
        {"LOCAL_WORLD_SIZE": None},
        {"MASTER_PORT": None},
        {"MASTER_PORT": "x"},
        {"MASTER_PORT": "70000"},
        {"MASTER_ADDR": None},
    ],
    ids=str,
)
def test_a_broken_launch_environment_is_told(monkeypatch, environment):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29400"}  # fmt: skip
    for name, value in (whole | environment).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{next(iter(environment))}.*start with torchrun"), distributed(60):
        pass


def test_group_forms_again_after_a_killed_rank():
    result = run_two_ranks("tests/parallel/failing.py", "killed once", restarts=1)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert result.stdout.count(f"rank {rank} restarted: {{'one': 2.0, 'rank': 1.0}}") == 1
