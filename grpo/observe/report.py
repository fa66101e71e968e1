"""The report of a run: one HTML file that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from grpo.data import read_image
from grpo.environment import environment
from grpo.observe import charts
from grpo.observe.charts import Curve, curve
from grpo.observe.files import write_atomically
from grpo.observe.grids import sample_grids
from grpo.observe.history import History

CURVES = {
    "reward_mean": "Reward",
    "loss": "Loss",
    "accuracy": "Accuracy",
    "kl": "KL to the reference",
    "entropy": "Entropy, nats a token",
    "grad_norm": "Gradient norm",
    "clip_fraction": "Share of ratios clipped",
    "ratio": "Mean probability ratio",
    "aux_ce": "Cross-entropy on real codes",
    "zero_spread": "Share of groups without spread",
    "images_per_second": "Images a second",
}
"""Metrics that the report shows first, in this order; the others follow under their own names."""

MAX_GRIDS = 6
SMALL_WIDTH = 500  # pixels; of less, single ones are to be seen when enlarged to the page's width


def write_report(
    run_dir: str | Path,
    *,
    title: str,
    summary: str = "",
    table: Sequence[Mapping[str, object]] = (),
    images: Sequence[tuple[str, str | Path]] = (),
    curves: Sequence[tuple[str, History]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes `run_dir`/report.html and returns its path; a reader of the old one never sees half of the new.

    Args:
        run_dir: the run's folder; its samples/ and recipe.toml are shown when they are there.
        title, summary: heading and one line under it.
        table: rows of a table of results, the same keys in each; floats are shown with four digits.
        images: (caption, PNG) pairs shown large, such as grids of the same seeds before and after. PNGs that are
            missing are an error.
        curves: (heading, metrics) pairs; None is the run's own metrics.jsonl.
        notes: what a reader must know to judge the numbers, one paragraph each.
    """
    run_dir = Path(run_dir)
    recipe = run_dir / "recipe.toml"
    curves = [("", History.read(run_dir / "metrics.jsonl"))] if curves is None else curves
    templates = Environment(
        loader=PackageLoader("grpo.observe", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("report.html").render(
        title=title,
        summary=summary,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        table=table,
        images=[(caption, _data_url(Path(path)), read_image(path).width < SMALL_WIDTH) for caption, path in images],
        groups=[(heading, *_split(history)) for heading, history in curves],
        samples=[(step, _data_url(path)) for step, path in _chosen(sample_grids(run_dir / "samples"))],
        notes=notes,
        recipe=recipe.read_text() if recipe.exists() else "",
        environment=environment(),
        charts=charts,
    )
    write_atomically(run_dir / "report.html", page)
    return run_dir / "report.html"


def _split(history: History) -> tuple[list[Curve], list[Curve]]:
    """The curves of a run: those of CURVES, and the rest."""
    series = history.series
    first = [curve(title, series[name]) for name, title in CURVES.items() if name in series]
    rest = [curve(name, series[name]) for name in series if name not in CURVES]
    return [found for found in first if found], [found for found in rest if found]


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _chosen(grids: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most six of the grids: the first, the last, and others evenly between."""
    if len(grids) <= MAX_GRIDS:
        return grids
    return [grids[round(i * (len(grids) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
