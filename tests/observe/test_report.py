"""The report: self-contained, complete, and safe to show any text."""

import base64
import json
import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

from grpo.observe import History, MetricsFile, image_grid, write_report
from grpo.observe.charts import curve, ticks
from grpo.observe.history import MAX_POINTS


@pytest.fixture
def run_dir(tmp_path):
    stream = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 41):
        stream.write(step, {"reward_mean": step / 40 - 2, "loss": 1e-4 * (-1) ** step, "lr": 1e-5, "once": step})
    stream.close()
    (tmp_path / "recipe.toml").write_text('[model]\nname = "GPT-B"  # <b>\n')
    (tmp_path / "samples").mkdir()
    for step in range(1, 100, 10):
        picture = image_grid(torch.full((1, 3, 4, 4), step, dtype=torch.uint8), columns=1)
        picture.save(tmp_path / "samples" / f"step-{step:06d}.png")
    return tmp_path


class Page(HTMLParser):
    """Collects what a page loads and checks that its tags are closed."""

    VOID = frozenset({"meta", "img", "line", "path", "circle", "br", "link"})

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


def test_a_report_needs_nothing_else(run_dir):
    path = write_report(run_dir, title="GRPO", images=[("before", run_dir / "samples" / "step-000001.png")])
    page = Page(path.read_text())
    assert page.images == 1 + 6
    assert all(link.startswith("data:image/png;base64,") for link in page.loaded)
    assert base64.b64decode(page.loaded[0].partition(",")[2]) == (run_dir / "samples" / "step-000001.png").read_bytes()
    assert "url(" not in path.read_text()
    assert not list(run_dir.glob(".report*"))


def test_curves_carry_their_values_for_hovering(run_dir):
    text = write_report(run_dir, title="GRPO").read_text()
    charts = dict(
        zip(
            re.findall(r'aria-label="(.*?) over the steps"', text),
            re.findall(r'data-points="(.*?)"', text),
            strict=True,
        )
    )
    assert list(charts) == ["Reward", "Loss", "lr", "once"]
    points = json.loads(unescape(charts["Reward"]))
    assert len(points) == 40
    assert points[0][2] == "step 1: -1.975"
    assert points[-1][2] == "step 40: -1"
    assert points[-1][0] > points[0][0]
    assert points[-1][1] < points[0][1]  # pixels count from the top


def test_any_text_is_shown_as_text(run_dir):
    text = write_report(
        run_dir,
        title="<script>alert(1)</script>",
        summary="a & b",
        table=[{"model": "<i>base</i>", "FID": 8.90123}, {"model": "after", "FID": 5.85}],
        notes=["1 < 2"],
    ).read_text()
    Page(text)
    assert "<script>alert" not in text
    assert "&lt;i&gt;base&lt;/i&gt;" in text
    assert "8.901" in text
    assert "1 &lt; 2" in text
    assert "# &lt;b&gt;" in text


def test_the_first_and_the_last_samples_are_shown(run_dir):
    captions = re.findall(r"<figcaption>Step (\d+)</figcaption>", write_report(run_dir, title="GRPO").read_text())
    assert len(captions) == 6
    assert (captions[0], captions[-1]) == ("1", "91")


def test_other_files_among_the_samples_are_left_alone(run_dir):
    (run_dir / "samples/step-best.png").write_text("not a grid")
    assert "Step 91" in write_report(run_dir, title="GRPO").read_text()


def test_an_empty_run_has_a_report(tmp_path):
    text = write_report(tmp_path, title="GRPO").read_text()
    Page(text)
    assert "<svg" not in text


def test_several_jobs_in_one_report(run_dir):
    curves = [("Tokenizer", History.read(run_dir / "metrics.jsonl")), ("GPT", History.read(run_dir / "none.jsonl"))]
    text = write_report(run_dir, title="quickstart", curves=curves).read_text()
    assert "<h2>Tokenizer</h2>" in text
    assert "<h2>GPT</h2>" not in text


def losses(values):
    history = History()
    for step, value in enumerate(values, 1):
        history.add(step, {"step": step, "loss": value})
    return history.series["loss"]


def test_a_curve_leaves_out_what_is_not_a_number():
    shown = curve("Loss", losses([2.0, None, 4.0]))
    assert shown.points == [(1, 2), (3, 4)]
    assert curve("Loss", losses([2.0, None])) is None


def test_a_long_curve_is_thinned_to_means():
    series = losses([step % 2 for step in range(1, 20_001)])
    assert len(series.points()) <= 2 * MAX_POINTS
    shown = curve("Loss", series)
    assert len(shown.points) <= MAX_POINTS
    assert shown.points[-1][0] == 20_000
    assert sum(value for _, value in shown.points) / len(shown.points) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-12, 1e30])
def test_a_constant_curve_has_a_scale(value):
    shown = curve("Loss", losses([value, value]))
    assert all(0 <= x <= 420 and 0 <= y <= 210 for x, y in shown.pixels)
    assert len(shown.y_ticks) >= 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.003, 0.0041), (1, 200), (1e6, 1.1e6), (0.99997, 1.00002)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low <= tick <= high for tick in found)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5)
