"""The learning benchmark: its cells fit together, a finished cell is known again, its arithmetic is right."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning

    yield learning
    for name in [name for name in sys.modules if name.startswith("learning")]:
        del sys.modules[name]


@pytest.fixture
def rows(learning):
    import learning_rows

    return learning_rows


@pytest.fixture
def report(learning):
    import learning_report

    return learning_report


def test_every_cell_has_what_it_needs_and_the_table_names_cells_that_exist(learning, rows, report):
    cells = rows.declare(rows.Sizes())
    assert all(need in cells for cell in cells.values() for need in cell.needs)
    order = learning.in_order_of_need(cells)
    assert all(order.index(need) < order.index(name) for name in cells for need in cells[name].needs)
    for line in report.table_lines(rows.Sizes()):
        assert set(line.looks.values()) | set(line.trainings.values()) <= set(cells)


def test_the_judge_of_claims_chooses_nothing_and_rewards_nothing(rows):
    cells = rows.declare(rows.Sizes())
    for name, cell in cells.items():
        claimed = cell.kind == "look" and cell.settings["judge"][0] == "judge"
        assert ("judge" in cell.needs) == claimed, name
        assert "@judge" not in str(cell.settings)
        assert "@chooser" not in str(cell.settings)
        chosen_by = cell.settings.get("grid", ()) or cell.settings.get("tuned", ())
        assert all(cells[look].settings["judge"] == rows.CHOOSES for look in chosen_by)


def test_a_finished_cell_is_known_again_until_what_it_builds_on_changes(learning, rows, tmp_path):
    sizes = rows.Sizes(making={"pretrain": 5})
    cells = rows.declare(sizes)
    store = learning.Store(tmp_path, cells)
    store.add(cells["base-3"], {"cpu_seconds": 1.0})
    store.add(cells["seconds/ce"], {"cpu_seconds_a_step": 1.0})
    with store.file.open("a") as file:
        file.write('{"name": "base-4", "key"')  # the machine stopped here
    assert set(learning.Store(tmp_path, cells).results) == {"base-3", "seconds/ce"}

    others = rows.declare(rows.Sizes(making={"pretrain": 5, "tokenizer": 7}))  # what base-3 reads
    assert learning.Store(tmp_path, others).results == {}

    lines = [json.loads(line) for line in store.file.read_text().splitlines()[:2]]
    store.file.write_text("".join(json.dumps({**line, "cpu": "another"}) + "\n" for line in lines))
    assert set(learning.Store(tmp_path, cells).results) == {"base-3"}, "times are of one machine"


def test_a_training_whose_weights_are_elsewhere_is_done_again_where_it_is_needed(learning, rows, tmp_path):
    cells = rows.declare(rows.Sizes())
    store = learning.Store(tmp_path, cells)
    for name in ("judge", "reward", "tokenizer-3", "base-3"):
        store.add(cells[name], {})
    for name in ("judge", "reward", "tokenizer-3"):
        (tmp_path / "models" / name).mkdir()
        (tmp_path / "models" / name / "model.safetensors").touch()
    names = [cell.name for cell in learning.missing(cells, ["look/base/3"], store)]
    assert names == ["base-3", "look/base/3"]
    store.add(cells["look/base/3"], {})
    assert learning.missing(cells, ["look/base/3"], store) == []


def test_the_best_candidate_is_trained_for_the_time_that_there_is(learning, rows, tmp_path):
    cells = rows.declare(rows.Sizes(seconds=80.0))
    store = learning.Store(tmp_path, cells)
    found = {"look/start:0": 0.3, "look/start:1": 0.2, "look/distill+grpo:0": 0.1, "look/distill+grpo:1": 0.4}
    store.results |= {name: {"fid": fid} for name, fid in found.items()}
    store.results["seconds/distill+grpo"] = {"cpu_seconds_a_step": 0.5, "cpu_seconds_once": 2.0}
    call, settings = learning.prepare(cells["distill+grpo/4.1"], store)
    flags = settings["flags"]
    assert call == "train"
    assert flags["training.steps"] == (80 / 2 - 2) / 0.5
    assert flags["optimizer.lr"] == 1e-4
    assert flags["model.checkpoint"] == tmp_path / "models" / "start" / "4.1" / "model.safetensors"
    _, settings = learning.prepare(cells["distill+grpo:1"], store)
    assert settings["flags"]["model.checkpoint"] == tmp_path / "models" / "start:1" / "model.safetensors"


def test_cells_run_in_processes_and_one_that_fails_is_named(learning, rows, tmp_path, capsys, monkeypatch):
    cells = {
        "good": rows.Cell("good", "look", 0, {"value": 3, "judge": rows.CHOOSES, "count": 1}),
        "bad": rows.Cell("bad", "look", 1, {"judge": rows.CHOOSES, "count": 1}),
        "after": rows.Cell("after", "look", 2, {"judge": rows.CHOOSES, "count": 1}, ("bad",)),
    }
    monkeypatch.setattr(learning.learning_cells, "look", lambda **settings: {"found": settings["value"]})
    store = learning.Store(tmp_path, cells)
    options = argparse.Namespace(workers=2, seconds=60.0)
    with pytest.raises(SystemExit) as ended:
        learning.Scheduler(store, learning.missing(cells, [""], store), options).run()
    assert ended.value.code == 1
    assert learning.Store(tmp_path, cells).results == {"good": {"found": 3}}
    assert "failed: bad" in capsys.readouterr().out
    assert "KeyError" in (tmp_path / "logs" / "bad.log").read_text()


def test_the_frontier_is_linear_between_its_points_and_flat_beyond(report):
    accuracies, fids = [0.9, 0.8, 1.0], [0.2, 0.3, 0.4]
    at = [report.frontier_at(accuracy, accuracies, fids) for accuracy in (0.7, 0.85, 0.95, 1.1)]
    assert at == pytest.approx([0.3, 0.25, 0.3, 0.4])


def test_the_interval_holds_what_differs_between_bases_seeds_and_draws(report):
    still = np.zeros(50)
    assert report.bootstrap({(3, 0): (0.5, still), (3, 1): (0.5, still), (4, 0): (0.5, still)}) == (0.5, 0.5)
    low, high = report.bootstrap({(base, 0): (float(base), still) for base in (0, 1, 2)})
    assert (low, high) == (0.0, 2.0)  # one base alone in 2 of 27 resamples
    rounds = np.random.default_rng(1).normal(7.0, 0.1, 2000)  # their own mean is not what was measured
    low, high = report.bootstrap({(3, 0): (1.0, rounds)})
    assert low == pytest.approx(1 - 0.196, abs=0.02)
    assert high == pytest.approx(1 + 0.196, abs=0.02)


def made_up(rows, seed=0):
    """A result of every cell: FID falls by .01 a row, every base has its own level."""
    random, results = np.random.default_rng(seed), {}
    for place, (name, cell) in enumerate(rows.declare(rows.Sizes()).items()):
        if cell.kind == "look":
            point = cell.settings.get("point", (1.5, 0.9) if "grid" in cell.settings else (1.0, 1.0))
            fid = 0.5 - 0.0005 * place + 0.01 * int("/4" in name)
            noise = random.normal(0, 0.002, 20)
            results[name] = {
                "fid": fid, "accuracy": 0.8 + 0.0005 * place, "precision": 0.9, "recall": 0.8, "entropy": 2.2,
                "gap": 0.0, "forwards": 1 if point[0] == 1 else 2, "images": 5000,
                "cfg_scale": point[0], "temperature": point[1],
                "fid_rounds": (fid + noise).tolist(), "accuracy_rounds": (0.8 + 0.0005 * place + noise / 9).tolist(),
            }  # fmt: skip
        elif cell.kind == "train":
            curve = {"step": [1, 2], "loss": [1.0, 0.5]}
            results[name] = {"cpu_seconds": 80.0, "seconds": 90.0, "steps": 40, "curve": curve}
    return results


def test_the_report_has_a_line_for_each_row_and_leaves_out_what_is_not_there(rows, report, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, sizes = made_up(rows), rows.Sizes()
    report.report(tmp_path, "all", results, sizes)
    found = json.loads((tmp_path / "all.json").read_text())
    table = (tmp_path / "all.md").read_text().splitlines()
    assert len(table) == 5 + len(found["rows"]) == 5 + len(report.table_lines(sizes))  # two heads, an empty line
    assert "] 6/6 |" in next(line for line in table if line.startswith("| distilled, then GRPO |"))
    by_name = {row["name"]: row for row in found["rows"]}
    plain, changed = by_name[rows.ROWS["plain"].title], by_name[rows.ROWS["no ce"].title]
    assert plain["against the plain row"] is None
    difference = changed["against the plain row"]["fid"]["mean"]
    assert difference == pytest.approx(changed["fid"] - plain["fid"])
    assert table.index("") < next(place for place, line in enumerate(table) if rows.ROWS["no ce"].title in line)
    for plot in ("fids", "frontier", "curves"):
        assert (tmp_path / f"all-{plot}.png").stat().st_size > 5000

    few = {
        name: result
        for name, result in results.items()
        if name.startswith(("look/base", "guided/base/3", "look/grpo/3"))
    }
    report.report(tmp_path, "few", few, sizes)
    found = {row["name"]: row for row in json.loads((tmp_path / "few.json").read_text())["rows"]}
    assert set(found) == {"base", "base, tuned guidance", "GRPO"}
    assert found["GRPO"]["against guided base"]["pairs"] == 2
    assert found["GRPO"]["against the guided base at its accuracy"] is None
    assert "against guided CE" not in found["GRPO"]
