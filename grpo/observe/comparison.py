"""Several runs side by side: what differs in their recipes, their curves, their numbers, their images."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import tomli

from grpo.config import RECIPES, UserError, read_text, reading
from grpo.config.keys import section_keys
from grpo.observe.catalogue import FIRST, metric
from grpo.observe.charts import ChartNumbers, group
from grpo.observe.files import judge_records
from grpo.observe.grids import sample_grids
from grpo.observe.history import LARGEST, History
from grpo.observe.page import write_page
from grpo.observe.pictures import data_url, strips
from grpo.observe.tables import Cell, Table, compared, with_interval

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t: half of a 95 % interval in standard errors, of 2, 3, ... 10 values; beyond 10, 2.26 is near enough."""

_PLACES = ("metrics.run_dir", "metrics.wandb_run_name", "checkpoint.dir", "checkpoint.resume")


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


def read_run(folder: str | Path, *, name: str) -> Run:
    """What a run has left in its folder. Raises a UserError: it is not a run's, or damaged."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    settings = {}
    with reading(f"{folder / 'recipe.toml'} cannot be read"):
        if (folder / "recipe.toml").is_file():
            settings = _flat(tomli.loads(read_text(folder / "recipe.toml")))
    history, samples = History.read(folder / "metrics.jsonl"), folder / "samples"
    grids, strips = dict(sample_grids(samples)), dict(sample_grids(samples, "judge"))
    return Run(name, folder, settings, history, judge_records(folder), grids, strips)


def recipe_table(runs: Sequence[Run]) -> Table:
    """The keys whose values are not the same in all runs; places of files of the run are left out.

    A key that one job has and another lacks is told where it is not at its default.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in _PLACES)
    defaults = {key: value for run in runs for key, value in _defaults(run).items()}
    rows = []
    for key in keys:
        values = [str(run.settings.get(key, defaults.get(key, "-"))) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((key, [Cell(str(run.settings.get(key, "-"))) for run in runs]))
    return Table("What differs in the recipes", [run.name for run in runs], rows)


def _defaults(run: Run) -> dict[str, Any]:
    """Of all keys that its job has; tables of rewards have none."""
    job = RECIPES.get(run.settings.get("job", ""))
    keys = section_keys(job.sections()) if job else {}
    fields = {name: key.field for name, key in keys.items() if not key.field.is_required()}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


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
    their mean with a 95 % interval. Rewards are not ranked where the runs were rewarded for different things.

    A metric may have words before its name, such as "last fid", which stay.
    """
    groups, are_rewarded_alike = seed_groups(runs), len({_rewards(run) for run in runs}) == 1
    names = [f"mean of {_together([runs[number].name for number in group])}" for group in groups]
    rows = []
    for label, row in values.items():
        words, _, name = label.rpartition(" ")
        is_ranked = are_rewarded_alike or not name.startswith("reward")
        cells = compared(row, better=metric(name).better if is_ranked else "")
        cells += [Cell(mean_and_interval([row[number] for number in group])) for group in groups]
        rows.append((label if words else metric(name).title, cells))
    return Table(title, [run.name for run in runs] + names, rows, note)


def _rewards(run: Run) -> str:
    """What its recipe rewards."""
    return json.dumps({k: v for k, v in run.settings.items() if k.startswith("reward.")}, sort_keys=True, default=str)


def _together(names: Sequence[str]) -> str:
    """A name for several runs: what the names that a sweep has given them have in common, or all of them."""
    parts = [name.split(",") for name in names]
    common = [part for part in parts[0] if "=" in part and all(part in other for other in parts)]
    return f"{len(names)}, {','.join(common)}" if common else ", ".join(names)


def end_table(runs: Sequence[Run]) -> Table:
    """Metrics at the end of each run: means over the last tenth of its steps."""
    ends = [{name: series.ends()[1] for name, series in run.history.series.items()} for run in runs]
    values = {name: [end.get(name) for end in ends] for name in FIRST if any(name in end for end in ends)}
    return numbers_table("At the end", runs, values, note="Means over the last tenth of the steps.")


def judge_table(runs: Sequence[Run]) -> Table | None:
    """What each run's judge said last, and the best FID with its step; None where no run has a judge."""
    if not any(run.judged for run in runs):
        return None
    last = [run.judged[-1] if run.judged else {} for run in runs]
    rated = [[record for record in run.judged if "fid" in record] for run in runs]
    best = [min(records, key=lambda record: record["fid"], default={}) for records in rated]
    values = {"last step": [record.get("step") for record in last]}
    for name in ("fid", "accuracy"):
        values[f"last {name}"] = [record.get(name) for record in last]
    values |= {"best fid": [record.get("fid") for record in best], "at step": [record.get("step") for record in best]}
    return numbers_table("By the judge", runs, values)


def mean_and_interval(values: Sequence[float | None]) -> str:
    """Their mean and, of at least two, half of its 95 % interval by Student's t, as text."""
    known = [value for value in values if value is not None and abs(value) <= LARGEST]
    if len(known) < 2:
        return "-"
    half = T_95[min(len(known) - 2, len(T_95) - 1)] * stdev(known) / math.sqrt(len(known))
    return with_interval(fmean(known), half)


def write_comparison(path: str | Path, runs: Sequence[Run], tables: Sequence[Table]) -> Path:
    """One HTML page that needs nothing else: tables, overlaid curves, images of the same step side by side."""
    step, grids = _of_the_same_step([run.grids for run in runs])
    judged, pictures = _of_the_same_step([run.strips for run in runs])
    names, numbers = [run.name for run in runs], ChartNumbers()
    return write_page(
        Path(path),
        "comparison.html",
        title=", ".join(names),
        names=names,
        tables=tables,
        group=group("Curves", [run.history for run in runs], numbers),
        strips=strips(
            f"The judge's samples, the same requests, step {judged}", list(zip(names, pictures, strict=False))
        ),
        step=step,
        samples=list(zip(names, map(data_url, grids), strict=False)),
        numbers=numbers,
    )


def _of_the_same_step(pictures: Sequence[Mapping[int, Path]]) -> tuple[int, list[Path]]:
    """The last step of which there is a picture of each run, and these; nothing where there is none."""
    common = set.intersection(*map(set, pictures))
    step = max(common, default=0)
    return step, [found[step] for found in pictures] if common else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
