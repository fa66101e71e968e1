"""benchmarks/gpu.sh on a machine that may be taken away: with a program in Python's place that writes and waits."""

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
FAKE = """#!/usr/bin/env bash
case "$*" in
  *bench_rollout*) while [ "$1" != --json ]; do shift; done; echo '{"batches": [8]}' > "$2"; sleep "$WAIT" ;;
  *bench_run*) exit 3 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "python"
    program.write_text(FAKE)
    program.chmod(0o755)

    def run(*arguments, **variables):
        environment = {**os.environ, "PYTHON": str(program), "SITE": "/", "PACK_SECONDS": "0.1", **variables}
        return subprocess.Popen(
            [SCRIPT, *map(str, arguments)], env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return run


def contents(archive):
    with tarfile.open(archive) as opened:
        return [Path(name).name for name in opened.getnames()]


def test_a_part_that_fails_or_takes_too_long_ends_no_other(start, tmp_path):
    done = start(tmp_path / "out", "run", "rollout", "rollout", WAIT="60", ROLLOUT_SECONDS="5", SECONDS_IN_ALL="9")
    printed, _ = done.communicate(timeout=30)
    told = [line.split(",")[0] for line in printed.partition("==== all")[2].splitlines()[1:]]
    assert told == ["== bench-run: exit code 3", "== bench-rollout: exit code 124", "bench-rollout: not begun"]
    assert os.listdir(tmp_path / "out") == ["results.tgz"]
    assert any(name.endswith("-gpu-rollout.json") for name in contents(tmp_path / "out" / "results.tgz"))


def test_a_case_that_has_finished_is_kept_when_all_is_killed(start, tmp_path):
    running, archive = start(tmp_path / "out", "rollout", WAIT="60"), tmp_path / "out" / "results.tgz"
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline and not archive.exists():
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    assert any(name.endswith("-gpu-rollout.json") for name in contents(archive))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a folder for the results is missing"),
        ([""], "a folder for the results is missing"),
        (["smoke", "run"], "smoke is a part"),
        (["{out}"], "no part is named"),
        (["{out}", "run", "kernel"], "kernel is no part"),
        (["/dev/null/x", "run"], "cannot write to the folder /dev/null/x"),
    ],
)
def test_mistakes_are_told_before_anything_runs(start, tmp_path, arguments, message):
    done = start(*(argument.format(out=tmp_path / "out") for argument in arguments))
    printed, told = done.communicate(timeout=20)
    assert done.returncode == 2
    assert message in told
    assert "parts: smoke" in told
    assert not printed


def test_wheels_are_collected_beside_what_else_a_folder_has(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "old-1.0-py3-none-any.whl").touch()
    command = [SCRIPT.with_name("collect_wheels.sh"), tmp_path]
    environment = {**os.environ, "PYTHON": "false"}  # a program that fails, as without a package index
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert os.listdir(tmp_path) == ["notes.txt"]
    done = subprocess.run([*command, "--peer"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown flag --peer" in done.stderr
