"""Processes that stand still, ranks that are slow, signals that ask to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from grpo.training.stop_request import SIGNALS, StopRequest
from grpo.training.stragglers import PATIENCE, Stragglers, own_work
from grpo.training.watchdog import Watchdog


@pytest.fixture(autouse=True)
def _nothing_is_ignored():
    """A shell without job control starts what runs in its background with SIGINT ignored, which a run then keeps."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_who_stands_still_says_where_and_ends(tmp_path, capfd):
    ends = []
    watchdog = Watchdog(0.3, rank=3, heartbeat=tmp_path / "heartbeat.json", end=ends.append)
    with ExitStack() as stack:
        watchdog.start(until=stack)
        for _ in range(8):  # longer than may be stood still, but there is progress
            watchdog.step_begins(7)
            watchdog.phase_begins("data")
            time.sleep(0.1)
        assert not ends
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ends[0] == 1
    told = capfd.readouterr().err
    assert "Rank 3 on" in told
    assert "step 7, phase data, longer than parallel.timeout" in told
    assert "test_watchdog.py" in told  # where its threads are
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"]) == (7, "data")


def test_it_ends_with_the_run(capfd):
    ends = []
    with ExitStack() as stack:
        Watchdog(0.2, rank=0, end=ends.append).start(until=stack)
    time.sleep(0.5)
    assert not ends


def test_the_last_beat_says_how_the_run_ended(tmp_path):
    file = tmp_path / "heartbeat.json"
    with ExitStack() as stack:
        watchdog = Watchdog(100, rank=0, heartbeat=file)
        watchdog.start(until=stack)
        watchdog.step_begins(6)
    beat = json.loads(file.read_text())
    assert (beat["step"], beat["finished"]) == (6, True)
    assert "ended" not in beat
    stack = ExitStack()
    Watchdog(100, rank=0, heartbeat=file).start(until=stack)
    stack.__exit__(ValueError, ValueError("a reason"), None)
    beat = json.loads(file.read_text())
    assert beat["ended"] == "ValueError: a reason"
    assert "finished" not in beat


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_acknowledged_and_the_handler_given_back(number, capfd):
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored: tests may run under nohup
    request = StopRequest()
    try:
        with ExitStack() as stack:
            request.listen(until=stack)
            assert request.reason is None
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the echo of a launcher
            assert request.reason == number.name
            assert capfd.readouterr().err.count(f"{number.name}: stops after this step") == 1
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


TWICE = """
import os, signal, time
from contextlib import ExitStack
import grpo.training.stop_request as module
module.SAME_SECONDS = 0.1
with ExitStack() as stack:
    module.StopRequest().listen(until=stack)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_a_second_signal_ends_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=100)
    assert done.returncode == 130
    assert "SIGINT again: ends now" in done.stderr
    assert done.stdout == ""


def test_a_rank_that_is_slow_for_long_is_named_once():
    stragglers = Stragglers()
    warnings = [stragglers.look(torch.tensor([1.0, 5.0, 1.2], dtype=torch.float64)) for _ in range(2 * PATIENCE)]
    assert [bool(look.warnings) for look in warnings] == [step == PATIENCE - 1 for step in range(2 * PATIENCE)]
    assert "rank 1 was the slowest" in warnings[PATIENCE - 1].warnings[0]
    assert warnings[0].metrics == {"ranks/slowest": 1, "ranks/slowest_seconds": 5, "ranks/median_seconds": 1.2}
    assert stragglers.look(torch.tensor([1.0])).metrics == {}
    assert own_work({"seconds/data": 1.0, "seconds/update": 9.0, "seconds/reward": 0.5}) == 1.5


@pytest.mark.parametrize("quick", [[1.0, 1.0, 1.9], [0.001, 0.001, 0.05]])
def test_small_differences_are_no_stragglers(quick):
    stragglers = Stragglers()
    assert not any(stragglers.look(torch.tensor(quick)).warnings for _ in range(2 * PATIENCE))


CLOSED = """
import sys
from grpo.observe.console import ProgressDisplay
display = ProgressDisplay("x", 3)
for step in range(1, 4):
    sys.stdin.readline()
    display.update(step, {}, line=True)
print("done", flush=True)
"""


def test_an_output_that_nobody_reads_any_more_disturbs_nobody():
    child = subprocess.Popen(
        [sys.executable, "-c", CLOSED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stderr.readline().startswith("x 1/3")
    child.stderr.close()
    assert child.communicate("\n\n", timeout=60)[0] == "done\n"
    assert child.returncode == 0
