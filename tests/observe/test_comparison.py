"""Several runs side by side, in tables and on a page."""

import json

import pytest
import torch

from grpo.config import UserError
from grpo.observe import Cell, MetricsFile, end_table, image_grid, judge_table, numbers_table, read_run, recipe_table
from grpo.observe.comparison import mean_and_interval, seed_groups, write_comparison
from tests.browser import look, needs_browser
from tests.observe.test_report import Page, numbers

RECIPE = '[model]\nname = "GPT-B"\n[optimizer]\nlr = {lr}\n[training]\nseed = {seed}\n[metrics]\nrun_dir = "{name}"\n'


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one recipe, and another recipe with a judge and a hostile name."""

    def make(name, *, lr, seed, slope, judged=()):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        stream = MetricsFile(folder / "metrics.jsonl")
        for step in range(1, 41):
            stream.write(step, {"reward_mean": slope * step + seed, "ratio": 1.0, f"own_{seed}": step})
        stream.close()
        (folder / "recipe.toml").write_text(RECIPE.format(lr=lr, seed=seed, name=name))
        if judged:
            (folder / "judge.json").write_text(json.dumps(list(judged)))
        for step in (10, 20 + 10 * seed):
            picture = image_grid(torch.full((12, 3, 24, 24), step, dtype=torch.uint8), columns=12)
            picture.save(folder / "samples" / f"step-{step:06d}.png")
        return read_run(folder, name=name)

    records = [{"step": 0, "fid": 9.0}, {"step": 20, "fid": 4.0, "accuracy": 0.5}, {"step": 40, "fid": 5.0}]
    return [
        make("plain-0", lr=1e-3, seed=0, slope=1),
        make("plain-1", lr=1e-3, seed=1, slope=1),
        make("<b>other</b>" + "-long" * 12, lr=2e-3, seed=0, slope=2, judged=records),
    ]


def test_what_differs_in_the_recipes(runs):
    table = recipe_table(runs)
    rows = [("optimizer.lr", ["0.001", "0.001", "0.002"]), ("training.seed", ["0", "1", "0"])]
    assert table.rows == [(name, [*map(Cell, cells)]) for name, cells in rows]
    assert seed_groups(runs) == [[0, 1]]
    of_grpo = {"job": "train", "training.seed": 0, "rollout.temperature": 1.0, "rollout.top_k": 100}
    jobs = [
        run._replace(settings=settings) for run, settings in zip(runs, [{"job": "pretrain"}, of_grpo], strict=False)
    ]
    rows = [("job", ["pretrain", "train"]), ("rollout.top_k", ["-", "100"])]
    assert recipe_table(jobs).rows == [(name, [*map(Cell, cells)]) for name, cells in rows]


def test_numbers_at_the_end_with_the_interval_of_seeds(runs):
    table = end_table(runs)
    assert table.columns == [*(run.name for run in runs), "mean of plain-0, plain-1"]
    name, cells = table.rows[0]
    assert name == "Reward"
    assert [*map(str, cells[:3])] == ["38.5", "39.5 (+1.0)", "77.0 (+38.5)"]  # of steps 37 to 40
    assert [(cell.improved, cell.best) for cell in cells[:3]] == [(None, False), (True, False), (True, True)]
    assert cells[3].text == "39.0 ± 6.4"  # 12.706 * sqrt(.5) / sqrt(2)
    swept = [run._replace(name=f"lr=0.001,seed={seed}") for seed, run in enumerate(runs[:2])]
    assert end_table(swept).columns[2] == "mean of 2, lr=0.001"


def test_rewards_of_different_things_are_not_ranked(runs):
    runs[2].settings["reward.clip.weight"] = 1.0
    _, cells = end_table(runs).rows[0]
    assert [(cell.improved, cell.best) for cell in cells[:3]] == [(None, False)] * 3


def test_interval_by_hand():
    assert mean_and_interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 * 1 / sqrt(3)
    assert mean_and_interval([1.0, None]) == "-"


def test_what_the_judges_said(runs):
    rows = dict(judge_table(runs).rows)
    assert [rows[name][2].text for name in ("last step", "last fid", "last accuracy", "best fid", "at step")] == [
        "40", "5", "-", "4", "20",
    ]  # fmt: skip
    assert rows["last fid"][0].text == "-"
    assert judge_table(runs[:2]) is None


def test_a_page_needs_nothing_else_and_shows_any_text(runs, tmp_path):
    tables = [recipe_table(runs), end_table(runs), numbers_table("none", runs, {}, note="Not <i>alike</i>")]
    path = write_comparison(tmp_path / "page.html", runs, tables)
    page, text = Page(path.read_text()), path.read_text()
    assert page.images == 3  # of step 10, which all have
    assert "Samples and their rewards, step 10" in text
    assert all(link.startswith("data:image/png;base64,") for link in page.loaded)
    assert "<b>other" not in text
    assert "<i>alike" not in text
    charts = numbers(path)["charts"]
    assert [chart["title"] for chart in charts] == ["Reward", "own_0", "own_1"]  # the ratio is flat
    assert [[line["run"] for line in chart["lines"]] for chart in charts] == [[0, 1, 2], [0, 2], [1]]


def test_the_same_requests_of_all_runs_under_each_other(runs, tmp_path):
    for run in runs:
        picture = image_grid(torch.zeros(10, 3, 24, 24), columns=10)
        for step in (0, 20):
            picture.save(run.folder / "samples" / f"judge-{step:06d}.png")
    again = [read_run(run.folder, name=run.name) for run in runs]
    text = write_comparison(tmp_path / "page.html", again, []).read_text()
    assert "step 20</h2>" in text
    assert Page(text).images == 3 + 3


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_it(runs, tmp_path, width):
    page = write_comparison(tmp_path / "page.html", runs, [recipe_table(runs), end_table(runs), judge_table(runs)])
    seen = look(page, width=width)
    assert seen["widths"] == [width, width]
    assert (seen["images"], seen["broken"], seen["lines"]) == (3, [], 3 + 2 + 1)
    assert seen["smallest"] >= 12


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no metrics.jsonl"):
        read_run(tmp_path, name="a")
    MetricsFile(tmp_path / "metrics.jsonl").close()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.toml").write_text("[model\n")
    with pytest.raises(UserError, match=r"recipe.toml cannot be read"):
        read_run(tmp_path, name="a")


def test_best_of_a_judge_without_fid(runs):
    rows = dict(judge_table([runs[0]._replace(judged=[{"step": 7, "accuracy": 0.5}]), runs[2]]).rows)
    assert [rows[name][0].text for name in ("last step", "best fid", "at step")] == ["7", "-", "-"]


def test_intervals_of_numbers_that_have_none():
    assert mean_and_interval([float("inf"), 1.0, 3.0]) == mean_and_interval([1.0, 3.0, float("nan"), 1.7e308])


def test_numbers_without_a_sum(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.7e308 * (-1) ** (step % 3), "kl": step}) + "\n" for step in range(50)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert [label for label, _ in end_table([read_run(tmp_path, name="x")]).rows] == ["KL to the reference"]
