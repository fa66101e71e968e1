"""The bar on a terminal, plain lines elsewhere, seconds per phase."""

import io
import time

import pytest
from rich.console import Console
from rich.text import Text

from grpo.observe import PhaseTimer, progress
from grpo.observe import console as console_module
from grpo.observe.console import ProgressDisplay, duration, headline


def recording(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None, force_interactive=False)


def test_headline_shows_what_there_is_in_order():
    metrics = {"loss": 0.00412, "other": 3.0, "reward_mean": -0.81234, "clip_fraction": 0.03}
    assert headline(metrics) == "reward -0.8123  loss 0.00412  clipped 0.03"
    assert headline({}) == ""


def test_headline_leaves_out_what_is_always_zero():
    """A NaN is not: it is what there is to see."""
    idle = {"reward_mean": 1.0, "loss": -3e-8, "clip_fraction": 0.0, "zero_spread": 0.0, "skipped_steps": 0.0}
    assert headline(idle) == "reward 1"
    watched = {"loss": float("nan"), "entropy": 5.5, "aux_ce": 6.0, "zero_spread": 0.25, "skipped_steps": 2.0}
    assert headline(watched) == "loss nan  entropy 5.5  CE 6  no spread 0.25  skipped 2"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_come_only_when_due():
    console = recording(terminal=False)
    display = ProgressDisplay("GRPO", 4, console=console)
    display.update(1, {"loss": 1.0}, line=False)
    display.update(2, {"loss": 0.5}, line=True)
    display.message("[saved] step 2")
    display.close()
    lines = console.file.getvalue().splitlines()
    assert lines == ["GRPO 2/4  loss 0.5  0:00 left", "[saved] step 2"]


def test_time_left_counts_only_the_steps_of_this_start(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    display = ProgressDisplay("GRPO", 30, start=10, console=recording(terminal=False))
    now = 105.0
    assert display.line(15, {}) == "GRPO 15/30  0:15 left"


def test_a_terminal_gets_a_bar_with_the_metrics():
    console = recording(terminal=True)
    display = ProgressDisplay("GRPO", 4, start=1, console=console)
    display.update(3, {"loss": 0.25}, line=False)
    display.close()
    text = console.file.getvalue()
    assert "3/4" in text
    assert "loss 0.25" in text
    assert "left" in text


def test_a_terminal_shows_how_far_a_long_step_is(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def shown():
        return [line.plain for line in display._bar.get_renderables() if isinstance(line, Text)]

    display = ProgressDisplay("GRPO", 4, console=recording(terminal=True), where=lambda: "rollout, code 3 of 64")
    now += 1.0
    assert shown() == []
    now += 2.0
    assert shown() == ["rollout, code 3 of 64, 0:03 into the step"]
    display.update(1, {"loss": 1.0}, line=True)
    assert shown() == ["loss 1", "rollout, code 3 of 64, 0:00 into the step"], "the next step's from its beginning on"
    display.close()


def test_a_pipe_gets_nothing_of_a_long_step(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    display = ProgressDisplay("GRPO", 4, console=recording(terminal=False), where=lambda: "rollout")
    now += 10.0
    display.update(1, {"loss": 1.0}, line=True)
    display.close()
    assert display.console.file.getvalue() == "GRPO 1/4  loss 1  0:30 left\n"


def test_progress_passes_everything_on(monkeypatch):
    consoles = []

    def console(stderr):
        consoles.append(recording(terminal=False))
        return consoles[-1]

    monkeypatch.setattr(console_module, "_Terminal", console)
    assert list(progress([3, 1, 2], "decode")) == [3, 1, 2]
    assert consoles[0].file.getvalue() == "decode 3/3  0:00 left\n"
    assert list(progress([1, 2], "quiet", show=False)) == [1, 2]
    assert list(progress([], "nothing")) == []
    assert len(consoles) == 1


def test_phases_add_up_and_start_anew(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer()
    for seconds in (1.0, 2.0):
        with timer("rollout"):
            now += seconds
    with timer("update"):
        now += 4.0
    now += 0.5
    assert timer.read() == {"seconds/rollout": 3.0, "seconds/update": 4.0, "seconds/step": 7.5}
    now += 1.0
    assert timer.read() == {"seconds/step": 1.0}


def test_a_phase_inside_another_is_counted_once(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer()

    def encode(seconds):
        nonlocal now
        now += seconds

    for _ in range(2):
        with timer("rollout"):
            now += 1.0
            timer("encode")(encode)(0.25)  # a phase can also wrap a function
            now += 1.0
    assert timer.read() == {"seconds/encode": 0.5, "seconds/rollout": 4.0, "seconds/step": 4.5}


def test_a_part_of_a_phase_is_counted_to_both(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer()
    with timer("reward"):
        now += 1.0
        with timer("reward/clip"):
            now += 2.0
        with timer("decode"):
            now += 4.0
    times = {"seconds/reward": 3.0, "seconds/reward/clip": 2.0, "seconds/decode": 4.0, "seconds/step": 7.0}
    assert timer.read() == times
