"""Several runs side by side, in tables and on a page."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from grpo.config import UserError
from grpo.observe import MetricsFile, end_table, image_grid, judge_table, numbers_table, read_run, recipe_table
from grpo.observe.comparison import mean_and_interval, seed_groups, write_comparison
from tests.observe.test_report import Page

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
    assert table.rows == [("optimizer.lr", ["0.001", "0.001", "0.002"]), ("training.seed", ["0", "1", "0"])]
    assert seed_groups(runs) == [[0, 1]]


def test_numbers_at_the_end_with_the_interval_of_seeds(runs):
    table = end_table(runs)
    assert table.columns == [*(run.name for run in runs), "mean of plain-0, plain-1"]
    name, cells = table.rows[0]
    assert name == "Reward"
    assert cells[:3] == ["38.5", "39.5 (+1)", "77 (+38.5)"]  # of steps 37 to 40
    assert cells[3] == "39 ± 6.4"  # 12.706 * sqrt(.5) / sqrt(2)
    swept = [run._replace(name=f"lr=0.001,seed={seed}") for seed, run in enumerate(runs[:2])]
    assert end_table(swept).columns[2] == "mean of 2, lr=0.001"


def test_interval_by_hand():
    assert mean_and_interval([1.0, 2.0, 3.0]) == "2 ± 2.5"  # 4.303 * 1 / sqrt(3)
    assert mean_and_interval([1.0, None]) == "-"


def test_what_the_judges_said(runs):
    rows = dict(judge_table(runs).rows)
    assert [rows[name][2] for name in ("last step", "last fid", "last accuracy", "best fid", "at step")] == [
        "40", "5", "-", "4", "20",
    ]  # fmt: skip
    assert rows["last fid"][0] == "-"
    assert judge_table(runs[:2]) is None


def test_a_page_needs_nothing_else_and_shows_any_text(runs, tmp_path):
    tables = [recipe_table(runs), end_table(runs), numbers_table("none", runs, {}, note="Not <i>alike</i>")]
    text = write_comparison(tmp_path / "page.html", runs, tables).read_text()
    page = Page(text)
    assert page.images == 3  # of step 10, which all have
    assert "Samples, step 10" in text
    assert all(link.startswith("data:image/png;base64,") for link in page.loaded)
    assert "<b>other" not in text
    assert "<i>alike" not in text
    assert "Mean probability ratio" not in re.findall(r"<h3>(.*?)</h3>", text)  # flat
    assert text.count('class="mean"') == 3 + 2 + 1  # the reward of all; own_0 of two runs, own_1 of one


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_nothing_overflows_on_a_phone(runs, tmp_path):
    page = write_comparison(tmp_path / "page.html", runs, [recipe_table(runs), end_table(runs)])
    frame = tmp_path / "phone.html"
    frame.write_text(
        '<iframe src="page.html" width="390" height="800" style="border:0"></iframe><p>-</p><script>'
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.querySelector('p').textContent = `widths ${page.scrollWidth} ${page.clientWidth}`; };</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files"]
    command += ["--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    widths = re.search(r"widths (\d+) (\d+)", dom)
    assert widths, dom[-500:]
    assert int(widths[1]) <= int(widths[2]) == 390
    assert page.exists()


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no metrics.jsonl"):
        read_run(tmp_path, name="a")
    MetricsFile(tmp_path / "metrics.jsonl").close()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.toml").write_text("[model\n")
    with pytest.raises(UserError, match=r"recipe.toml cannot be read"):
        read_run(tmp_path, name="a")
