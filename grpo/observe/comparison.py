"""Several runs side by side: what differs in their recipes, their curves, their numbers, their images."""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import tomli
from jinja2 import Environment, PackageLoader, StrictUndefined

from grpo.config import UserError, read_text, reading
from grpo.observe import charts
from grpo.observe.files import write_atomically
from grpo.observe.grids import sample_grids
from grpo.observe.history import History
from grpo.observe.report import CURVES

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t: half of a 95 % interval in standard errors, of 2, 3, ... 10 values; beyond 10, 2.26 is near enough."""

_PLACES = ("metrics.run_dir", "metrics.wandb_run_name", "checkpoint.dir", "checkpoint.resume")
LAST_SHARE = 0.1  # of the steps, whose mean stands for the end of a run


class Run(NamedTuple):
    """A run's folder.

    settings  section.key -> value of its recipe
    judged    records of its judge, the oldest first
    grids     step -> picture of samples; strips the same of the judge's, of the same classes and seeds every time
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    history: History
    judged: list[dict[str, float]]
    grids: dict[int, Path]
    strips: dict[int, Path]


class Table(NamedTuple):
    """Numbers of runs: a row for each metric, of as many cells as there are columns."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    note: str = ""


def read_run(folder: str | Path, *, name: str) -> Run:
    """What a run has left in its folder. Raises a UserError: it is not a run's, or damaged."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    settings, judged = {}, []
    with reading(f"{folder / 'recipe.toml'} cannot be read"):
        if (folder / "recipe.toml").is_file():
            settings = _flat(tomli.loads(read_text(folder / "recipe.toml")))
    with reading(f"{folder / 'judge.json'} cannot be read"):
        if (folder / "judge.json").is_file():
            judged = [dict(record) for record in json.loads(read_text(folder / "judge.json"))]
    strips = {}
    for path in (folder / "samples").glob("judge-*.png"):
        if match := re.fullmatch(r"judge-(\d+)\.png", path.name):
            strips[int(match[1])] = path
    history = History.read(folder / "metrics.jsonl")
    return Run(name, folder, settings, history, judged, dict(sample_grids(folder / "samples")), strips)


def recipe_table(runs: Sequence[Run]) -> Table:
    """The keys whose values are not the same in all runs; places of files of the run are left out."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in _PLACES)
    values = {key: [str(run.settings.get(key, "-")) for run in runs] for key in keys}
    rows = [(key, row) for key, row in values.items() if any(value != row[0] for value in row)]
    return Table("What differs in the recipes", [run.name for run in runs], rows)


def seed_groups(runs: Sequence[Run]) -> list[list[int]]:
    """The numbers of the runs whose recipes differ in seeds only, at least two together."""
    alike: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        rest = {key: value for key, value in run.settings.items() if key not in _PLACES and not key.endswith("seed")}
        alike.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(number)
    return [group for group in alike.values() if len(group) > 1]


def numbers_table(
    title: str, runs: Sequence[Run], values: Mapping[str, Sequence[float | None]], *, note: str = ""
) -> Table:
    """Metric -> its value in each run, with the difference to the first run; and of runs that differ in seeds only
    their mean with a 95 % interval."""
    groups = seed_groups(runs)
    names = [f"mean of {_together([runs[number].name for number in group])}" for group in groups]
    rows = []
    for metric, row in values.items():
        cells = [_cell(value, row[0] if number else None) for number, value in enumerate(row)]
        cells += [mean_and_interval([row[number] for number in group]) for group in groups]
        rows.append((metric, cells))
    return Table(title, [run.name for run in runs] + names, rows, note)


def _together(names: Sequence[str]) -> str:
    """A name for several runs: what the names that a sweep has given them have in common, or all of them."""
    parts = [name.split(",") for name in names]
    common = [part for part in parts[0] if "=" in part and all(part in other for other in parts)]
    return f"{len(names)}, {','.join(common)}" if common else ", ".join(names)


def end_table(runs: Sequence[Run]) -> Table:
    """Metrics at the end of each run: means over the last tenth of its steps."""
    known = {name: title for name, title in CURVES.items() if any(name in run.history.series for run in runs)}
    values = {title: [_end(run.history, name) for run in runs] for name, title in known.items()}
    return numbers_table("At the end", runs, values, note="Means over the last tenth of the steps.")


def judge_table(runs: Sequence[Run]) -> Table | None:
    """What each run's judge said last, and the best FID with its step; None where no run has a judge."""
    if not any(run.judged for run in runs):
        return None
    last = [run.judged[-1] if run.judged else {} for run in runs]
    best = [min(run.judged, key=lambda record: record.get("fid", math.inf)) if run.judged else {} for run in runs]
    values = {"last step": [record.get("step") for record in last]}
    for name in ("fid", "accuracy"):
        values[f"last {name}"] = [record.get(name) for record in last]
    values |= {"best fid": [record.get("fid") for record in best], "at step": [record.get("step") for record in best]}
    return numbers_table("By the judge", runs, values)


def mean_and_interval(values: Sequence[float | None]) -> str:
    """Their mean and, of at least two, half of its 95 % interval by Student's t, as text."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "-"
    half = T_95[min(len(known) - 2, len(T_95) - 1)] * stdev(known) / math.sqrt(len(known))
    return f"{fmean(known):.4g} ± {half:.2g}"


def write_comparison(path: str | Path, runs: Sequence[Run], tables: Sequence[Table]) -> Path:
    """One HTML page that needs nothing else: tables, overlaid curves, images of the same step side by side."""
    names = dict.fromkeys(name for run in runs for name in run.history.series)
    shown = [charts.overlay(title, _series(runs, name)) for name, title in CURVES.items() if name in names]
    rest = [charts.overlay(name, _series(runs, name)) for name in names if name not in CURVES]
    pictures = []
    for title, kind in (("Samples", "grids"), ("The judge's samples, same classes and seeds", "strips")):
        common = set.intersection(*(set(getattr(run, kind)) for run in runs))
        if common:
            step = max(common)
            urls = [_data_url(getattr(run, kind)[step]) for run in runs]
            pictures.append((f"{title}, step {step}", list(zip([run.name for run in runs], urls, strict=True))))
    templates = Environment(
        loader=PackageLoader("grpo.observe", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("comparison.html").render(
        names=[run.name for run in runs],
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        tables=tables,
        curves=[found for found in shown if found],
        rest=[found for found in rest if found],
        pictures=pictures,
        charts=charts,
    )
    write_atomically(Path(path), page)
    return Path(path)


def _series(runs: Sequence[Run], name: str) -> list[charts.Series | None]:
    return [run.history.series.get(name) for run in runs]


def _end(history: History, name: str) -> float | None:
    points = history.series[name].points() if name in history.series else []
    return fmean(value for _, value in points[-max(1, round(LAST_SHARE * len(points))) :]) if points else None


def _cell(value: float | None, first: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if first in (None, value) else f"{value:.4g} ({value - first:+.3g})"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
