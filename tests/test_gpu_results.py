"""The page of GPU results: current, honest about what is missing, one line a measurement."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_results

    yield gpu_results
    for name in [name for name in sys.modules if name.startswith("bench_") or name in ("gpu_results", "harness")]:
        del sys.modules[name]


def test_the_page_is_current(gpu_results):
    assert gpu_results.PAGE.read_text(encoding="utf-8") == gpu_results.page(), "run python benchmarks/gpu_results.py"


def test_each_measurement_has_a_line_and_what_was_not_measured_a_dash(gpu_results, tmp_path):
    head = {"versions": {"torch": "2.11"}, "hardware": {"gpu": "1 x Some GPU"}}

    def held(figure, met):
        return {
            "what": "one draw, speed of eager",
            "wanted": "at least 3",
            "expected": "6",
            "figure": figure,
            "met": met,
        }

    for day, figures in (("2026-01-01", (2.5, False)), ("2026-01-02", (4.0, True)), ("2026-01-03", (None, None))):
        content = {**head, "date": day, "targets": [held(*figures)]}
        (tmp_path / f"{day}-gpu-sampling.json").write_text(json.dumps(content))
    content = {**head, "date": "2026-01-02", "run_minutes": {"ours": 9.0}, "sides": {}}
    (tmp_path / "2026-01-02-gpu-run.json").write_text(json.dumps(content))
    (tmp_path / "2026-01-03-gpu-run.json").write_text(json.dumps(content | {"preset": "cpu"}))  # another model
    on_cpu = {"versions": {}, "hardware": {"cpu": "x"}, "date": "2026-01-01", "targets": [held(9.0, True)]}
    (tmp_path / "2026-01-04-gpu-sampling.json").write_text(json.dumps(on_cpu))
    lines = gpu_results.page(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("| one draw, speed of eager")] == [
        "| one draw, speed of eager | at least 3 | 6 | **2.5** | missed | 2026-01-01 | 1 x Some GPU | torch 2.11 |",
        "| one draw, speed of eager | at least 3 | 6 | **4** | reached | 2026-01-02 | 1 x Some GPU | torch 2.11 |",
    ]
    (minutes,) = [line for line in lines if line.startswith("| minutes")]
    assert "| **9** | missed | 2026-01-02 |" in minutes
    (peak,) = [line for line in lines if line.startswith("| peak")]
    assert peak.endswith("| - | | | | |")


def test_a_peer_that_is_missing_is_told_and_ends_no_other_side(gpu_results, monkeypatch):
    import harness

    monkeypatch.setattr(harness, "DEVICE", torch.device("cuda"))
    sides = harness.peers(absent=lambda: importlib.import_module("no_such_peer"))
    monkeypatch.setattr(harness, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(harness, "peak_bytes", lambda run: run() or 1)
    sides |= {"ours": lambda: None, "out of memory": lambda: [][1], "eager": lambda: None}
    case = harness.Case(name="case", sizes={}, sides=sides, error=lambda: {})
    result = harness.measure(case, {}, repeats=5, seconds=1)
    assert result.sides.keys() == {"ours", "eager"}
    assert result.speedup > 0
    assert result.failed == {
        "absent": "ModuleNotFoundError: No module named 'no_such_peer'",
        "out of memory": "IndexError: list index out of range",
    }


def test_checks_are_read_from_a_results_folder(gpu_results, tmp_path):
    (tmp_path / "summary.txt").write_text(
        "== a: exit code 1, 34 of 85 seconds\n== b: exit code 0, 5 of 9 seconds\nc: not begun, no time left\n"
    )
    (tmp_path / "a.xml").write_text(
        '<testsuites><testsuite errors="0" failures="2" skipped="1" tests="10" /></testsuites>'
    )
    steps = gpu_results.collect(tmp_path)["steps"]
    assert steps == [
        {"what": "a", "result": "7 passed, 2 failed, 1 skipped, 34 s"},
        {"what": "b", "result": "done, 5 s"},
    ]
