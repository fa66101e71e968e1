"""The report: self-contained, complete, and safe to show any text."""

import base64
import json
import os
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

from grpo.observe import Cell, History, MetricsFile, Table, gallery, image_grid, labelled_strips, write_report
from grpo.observe.charts import ChartNumbers, drawn, group
from grpo.observe.history import MAX_POINTS
from grpo.observe.report import judge_verdict, write_run_report
from tests.browser import look, needs_browser

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def run_dir(tmp_path):
    stream = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 41):
        stream.write(step, {"reward_mean": step / 40 - 2, "loss": 1e-4 * (-1) ** step, "lr": 1e-5, "own": step})
    stream.close()
    (tmp_path / "recipe.toml").write_text('[model]\nname = "GPT-B"  # <b>\n')
    (tmp_path / "samples").mkdir()
    for step in range(1, 100, 10):
        picture = image_grid(torch.full((1, 3, 4, 4), step, dtype=torch.uint8), columns=1)
        picture.save(tmp_path / "samples" / f"step-{step:06d}.png")
    return tmp_path


class Page(HTMLParser):
    """Collects what a page loads and checks that its tags are closed."""

    VOID = frozenset({"meta", "wbr", "img", "line", "path", "circle", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.images = [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def judged(run_dir, *fids):
    """Adds what a judge would leave: records, and a strip of ten images at each."""
    records = [{"step": 5 * number, "fid": fid, "accuracy": 0.5, "seconds": 1.0} for number, fid in enumerate(fids)]
    (run_dir / "judge.json").write_text(json.dumps(records))
    for record in records:
        strip = image_grid(torch.full((10, 3, 24, 24), record["step"], dtype=torch.uint8), columns=10)
        strip.save(run_dir / "samples" / f"judge-{record['step']:06d}.png")


def run_report(run_dir, **how):
    how = {"title": "GRPO", "summary": "", "about": [], **how}
    return write_run_report(run_dir, history=History.read(run_dir / "metrics.jsonl"), **how)


def numbers(path):
    return json.loads(re.search(r'id="numbers">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_a_report_needs_nothing_else(run_dir):
    path = run_report(run_dir)
    page, text = Page(path.read_text()), path.read_text()
    assert page.images == len(page.loaded) == 6
    assert all(link.startswith("data:image/png;base64,") for link in page.loaded)
    assert "url(" not in text
    assert "content=\"default-src 'none'; img-src data:; style-src 'sha256-" in unescape(text)
    assert not list(run_dir.glob(".report*"))


def test_curves_are_numbers_and_what_does_not_move_is_told(run_dir):
    path = run_report(run_dir)
    found = numbers(path)
    assert [chart["title"] for chart in found["charts"]] == ["Reward", "Loss", "own"]
    assert found["steps"] == [list(range(1, 41))]  # once for all
    values = found["charts"][0]["lines"][0]["values"]
    assert (len(values), values[0], values[-1]) == (40, -1.975, -1)
    assert "lr <b>1e-05</b>" in path.read_text()


def test_the_page_begins_with_the_verdict(run_dir, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/elsewhere/grpo/__main__.py", "train", "a b"])
    text = run_report(run_dir, about=["a line"]).read_text()
    assert "The end against the start: better in Reward (-1.94 to -1.04)." in text  # of steps 1-4 and 37-40
    judged(run_dir, 9.0, 4.0, 5.0)
    text = run_report(run_dir, recipe='name = "GPT-B"  # <b>').read_text()
    page = Page(text)
    assert "Step 10 against step 0: better in FID (9 to 5)." in text
    assert "<tr><th>step 5, the lowest FID</th>" in text
    assert page.images == 10 * 2 + 3 + 6  # pairs, strips, grids of rollouts
    assert text.index("against step 0") < text.index("From left to right: step 0 | step 10") < text.index("Curves</h2>")
    assert "step 5: FID 4, Accuracy 0.500" in text
    assert "# &lt;b&gt;" in text
    assert "<th>Command</th><td>grpo train &#39;a b&#39;" in text


def test_any_text_is_shown_as_text(run_dir):
    grid = run_dir / "grid.png"
    image_grid(torch.zeros(2, 3, 8, 8), columns=2).save(grid)
    history = History()
    for step in (1, 2):
        history.add(step, {HOSTILE: step, f"flat {HOSTILE}": 1.0})
    text = write_report(
        run_dir,
        title=HOSTILE,
        summary=f"{HOSTILE}\udcff",
        about=[HOSTILE],
        tables=[Table(HOSTILE, [HOSTILE], [(HOSTILE, [Cell(HOSTILE, HOSTILE)])], HOSTILE, HOSTILE)] * 2,
        notes=[HOSTILE],
        galleries=[gallery(HOSTILE, {HOSTILE: grid, "b": grid}, side=8, captions=[HOSTILE] * 2)],
        curves=[(HOSTILE, history)] * 2,
        facts={HOSTILE: HOSTILE},
        recipes=[(HOSTILE, HOSTILE)],
    ).read_text()
    Page(text)
    assert text.count("<script") == 2
    assert "<img src=x" not in text
    assert text.count("&lt;img src=x") > 20
    assert numbers(run_dir / "report.html")["charts"][0]["title"] == HOSTILE


def test_keys_break_at_dots_and_words_at_spaces(run_dir):
    rows = [(label, [Cell("1")]) for label in ("data.max_bad", "base, guidance 1.25")]
    text = write_report(run_dir, title="t", tables=[Table("t", ["a"], rows)]).read_text()
    assert "<th>data.<wbr>max_<wbr>bad</th>" in text
    assert "<th>base, guidance 1.25</th>" in text


def test_the_first_and_the_last_samples_are_shown(run_dir):
    captions = re.findall(r"<figcaption>Step (\d+)</figcaption>", run_report(run_dir).read_text())
    assert len(captions) == 6
    assert captions[:2] == ["91", "1"]  # the newest by itself, the others from the first on


def test_other_files_among_the_samples_are_left_alone(run_dir):
    judged(run_dir, 9.0, 4.0)
    for name in ("step-best.png", "judge-last.png"):
        (run_dir / "samples" / name).write_text("not a grid")
    (run_dir / "judge.json").write_text("[1")
    assert "Step 91" in run_report(run_dir).read_text()


def test_an_empty_run_has_a_report(tmp_path):
    text = run_report(tmp_path).read_text()
    Page(text)
    assert "data-chart" not in text


def test_several_jobs_in_one_report(run_dir):
    curves = [("Tokenizer", History.read(run_dir / "metrics.jsonl")), ("GPT", History.read(run_dir / "none.jsonl"))]
    text = write_report(run_dir, title="quickstart", curves=curves).read_text()
    assert "<h2>Tokenizer</h2>" in text
    assert "GPT" not in text


def history_of(values):
    history = History()
    for step, value in enumerate(values, 1):
        history.add(step, {"step": step, "loss": value})
    return history


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([2.0, None, 4.0], [2, 4]),
        ([1e308, 1e308, -1e308, 2.0, 3.0], [2, 3]),  # no axis has room for those
        ([2.0, None], "2"),
        ([0.0, 0.0], "0"),
        ([1.0, 1.0 + 1e-9], "1"),
        ([1e30, 1e30], "1e+30"),
        ([], None),
    ],
)
def test_what_is_drawn_and_what_is_told(values, shown):
    numbers = ChartNumbers()
    found = group("", [history_of(values)], numbers)
    if isinstance(shown, list):
        assert numbers.as_json()["charts"][0]["lines"][0]["values"] == shown
        assert (len(found.first), found.constants) == (1, [])
    else:
        assert (found.first, [text for _, text in found.constants]) == ([], [] if shown is None else [shown])


def test_a_million_steps_are_thinned_to_means(tmp_path):
    history = history_of(step % 2 for step in range(1, 1_000_001))
    series = history.series["loss"]
    assert len(series.points()) <= 2 * MAX_POINTS
    assert series.total == 500_000
    shown = drawn(series.points())
    assert len(shown) <= MAX_POINTS
    assert shown[-1][0] == 1_000_000
    assert sum(value for _, value in shown) / len(shown) == pytest.approx(0.5, abs=0.01)


def test_large_pictures_are_packed(tmp_path):
    (tmp_path / "samples").mkdir()
    noise = torch.randint(0, 256, (8, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = tmp_path / "samples" / "step-000001.png"
    image_grid(noise, columns=8).save(picture)
    path = run_report(tmp_path)
    assert Page(path.read_text()).loaded[0].startswith("data:image/webp;base64,")
    assert path.stat().st_size < 0.8 * picture.stat().st_size


HOVER = """
(() => {
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
const ticks = [...plot.querySelectorAll("text")].map((text) => text.textContent);
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 13, clientY: box.top + 20 }));
const pointed = plot.parentElement.querySelector("output").textContent;
plot.dispatchEvent(new PointerEvent("pointerleave"));
return { ticks, pointed, rest: plot.parentElement.querySelector("output").textContent };
})()
"""


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_a_browser_shows_all_of_it(run_dir, width, dark):
    judged(run_dir, 9.0, 4.0, 5.0)
    about = ["2 GPUs of a kind with a long name, and more of the same " * 3]
    path = run_report(run_dir, title=f"GRPO: {'long-name' * 9}", about=about, recipe=f"name = '{'x' * 300}'")
    seen = look(path, width=width, dark=dark, script=HOVER)
    assert seen["widths"] == [width, width]
    assert (seen["images"], seen["broken"]) == (29, [])
    assert seen["smallest"] >= 12
    assert seen["ground"] == ("rgb(20, 23, 27)" if dark else "rgb(246, 247, 249)")
    assert seen["lines"] == 3
    assert seen["hints"] == {1280: 1, 390: 3}[width]  # the recipe's long line; and curves and strips
    assert seen["found"]["ticks"][:3] == ["-2.0", "-1.5", "-1.0"]
    assert seen["found"]["ticks"][-1] == "step"
    assert (seen["found"]["pointed"], seen["found"]["rest"]) == ("step 40: -1", "-1")


@needs_browser
def test_a_browser_draws_what_is_odd(tmp_path):
    odd = {"tiny": 1e-12, "huge": 1e99, "steep": 1.0, "negative": -3e5}
    history = History()
    for step in (1, 2, 10**6):
        history.add(step, {name: value * step**0.5 for name, value in odd.items()} | {"steps": step})
    path = write_report(tmp_path, title=HOSTILE, curves=[(HOSTILE, history)])
    script = "[document.title, [...document.querySelectorAll('.raw')].map((line) => line.getAttribute('d'))]"
    title, lines = look(path, width=390, script=script)["found"]
    assert title == HOSTILE
    assert len(lines) == 1 + 5
    assert not re.search("NaN|Infinity", " ".join(lines))


@needs_browser
def test_a_browser_runs_no_script_but_the_pages_own(run_dir):
    path = run_report(run_dir)
    path.write_text(path.read_text().replace("<h1>", "<script>document.title = 'other'</script><h1>"))
    with pytest.raises(AssertionError, match="Content Security Policy"):
        look(path, width=390)


def test_a_curve_that_moves_little_keeps_its_digits():
    numbers = ChartNumbers()
    group("", [history_of([1.00001, 1.00002, 1.00004])], numbers)
    group("", [history_of([1e9, 0.123456, 0.5])], numbers)
    values = [chart["lines"][0]["values"] for chart in numbers.as_json()["charts"]]
    assert values == [[1.00001, 1.00002, 1.00004], [1e9, 0.12346, 0.5]]


def test_lines_that_do_not_move_are_told_whatever_a_single_point_says():
    found = group("", [history_of([2.0, 2.0]), history_of([3.0])], ChartNumbers())
    assert [text for _, text in found.constants] == ["2"]


def test_the_end_counts_each_step_once():
    series = history_of(range(1, 1202)).series["loss"]  # 600 pairs, and the last step alone
    last = range(1201 - 2 * 59, 1202)
    assert series.ends()[1] == sum(last) / len(last)


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "half", "nowhere"])
def test_what_is_no_picture_is_not_carried_away(run_dir, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_text("not to be seen by anybody else")
    for name in ("judge-000000.png", "judge-000005.png", "step-000091.png"):
        picture = run_dir / "samples" / name
        picture.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(picture)
        elif kind == "half":
            picture.write_bytes(b"\x89PNG\r\n\x1a\n")
        else:
            picture.symlink_to({"link": secret, "device": "/dev/zero", "nowhere": "nowhere"}[kind])
    (run_dir / "judge.json").write_text(json.dumps([{"step": 0, "fid": 2.0}, {"step": 5, "fid": 1.0}]))
    history = History.read(run_dir / "metrics.jsonl")
    page = write_run_report(run_dir, title="t", summary="", about=[], history=history).read_text()
    pictures = [base64.b64decode(found) for found in re.findall(r"base64,([\w+/=]+)", page)]
    assert pictures
    assert not any(secret.read_bytes() in content for content in pictures)
    assert not any(content == b"\x89PNG\r\n\x1a\n" for content in pictures)
    strip = labelled_strips([("one", run_dir / "samples" / "judge-000000.png")])
    assert strip.height < 100


def test_a_judge_without_fid_names_no_lowest():
    table = judge_verdict([{"step": 0, "accuracy": 0.5}, {"step": 5, "accuracy": 0.6}])
    assert [name for name, _ in table.rows] == ["step 0", "step 5"]
