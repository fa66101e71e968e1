"""The report of a run, or of several: one HTML file that needs nothing else."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from grpo.config import UserError
from grpo.environment import code_commit, environment
from grpo.observe.catalogue import FIRST, metric
from grpo.observe.charts import ChartNumbers, group
from grpo.observe.console import duration
from grpo.observe.files import judge_records
from grpo.observe.grids import GAP, picture_of, sample_grids
from grpo.observe.history import History
from grpo.observe.page import write_page
from grpo.observe.pictures import Gallery, Strips, data_url, gallery, strips
from grpo.observe.tables import Results, Table

Item = TypeVar("Item")

MAX_GRIDS, MAX_STRIPS = 6, 12
_NO_RESULTS = ("judge/fid", "judge/accuracy", "images_per_second")  # of FIRST: shown elsewhere, or not the model's


def write_report(
    run_dir: str | Path,
    *,
    title: str,
    summary: str = "",
    about: Sequence[str] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    galleries: Sequence[Gallery] = (),
    evolution: Strips | None = None,
    curves: Sequence[tuple[str, History]] = (),
    facts: Mapping[str, str] | None = None,
    recipes: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes `run_dir`/report.html and returns its path; a reader of the old one never sees half of the new.

    Args:
        run_dir: the run's folder; its samples/ are shown when they are there.
        title, summary, about: heading, one line under it, and more lines.
        tables: results; the first is what the page begins with, the others are folded.
        notes: what a reader must know to judge the numbers, one paragraph each.
        galleries: images before and after.
        evolution: the same requests as training goes on.
        curves: (heading, metrics) pairs; the first is shown, the others are folded.
        facts: what else to say of how it was run, beside the command, the commit, the machine and the versions.
        recipes: (heading, text) pairs.
    """
    run_dir, numbers = Path(run_dir), ChartNumbers()
    grids = _spread(sample_grids(run_dir / "samples"), MAX_GRIDS)
    samples = [(step, data_url(path)) for step, path in grids]
    shows_last = bool(samples) and not galleries and evolution is None
    groups = [group(heading, [history], numbers) for heading, history in curves]
    return write_page(
        run_dir / "report.html",
        "report.html",
        title=title,
        numbers=numbers,
        summary=summary,
        about=about,
        tables=tables,
        notes=notes,
        galleries=galleries,
        strips=evolution,
        newest=samples[-1:] if shows_last else [],
        earlier=samples[:-1] if shows_last else samples,
        groups=[found for found in groups if found.first or found.rest or found.constants],
        facts={"Command": _command(), **_commit(), **(facts or {}), **_machine()},
        recipes=recipes,
    )


def write_run_report(
    run_dir: Path, *, title: str, summary: str, about: Sequence[str], history: History, recipe: str = ""
) -> Path:
    """The report of one run: what its judge and its metrics say of before and after, its samples, its curves."""
    try:
        records = judge_records(run_dir)
    except UserError:  # of a damaged file the run's page says nothing
        records = []
    drawn = dict(sample_grids(run_dir / "samples", "judge"))
    judged = [(record, drawn[int(record["step"])]) for record in records if record["step"] in drawn]
    tables = [table for table in (judge_verdict(records), run_verdict(history)) if table is not None]
    seconds = history.series["seconds/step"].total if "seconds/step" in history.series else 0.0
    return write_report(
        run_dir,
        title=title,
        summary=summary,
        about=about,
        tables=tables,
        galleries=_before_and_after(judged),
        evolution=_evolution(_spread(judged, MAX_STRIPS)),
        curves=[("", history)],
        facts={"Time of all steps": duration(seconds), "Folder": str(run_dir)},
        recipes=[("The recipe, resolved", recipe)] if recipe else [],
    )


def judge_verdict(records: Sequence[Mapping[str, float]]) -> Table | None:
    """What the judge said first, at its lowest FID, and last; None where there is no judge."""
    if not records:
        return None
    best = min((record for record in records if "fid" in record), key=lambda record: record["fid"], default=None)
    chosen = {record["step"]: record for record in (records[0], best or records[0], records[-1])}
    chosen = dict(sorted(chosen.items()))
    lowest = None if best is None else best["step"]
    names = [f"step {step:.0f}{', the lowest FID' if step == lowest else ''}" for step in chosen]
    note = "Small numbers: difference to the first row. Bold: the best."
    return _said(names, list(chosen.values())).by_name("Before and after, by the judge", note=note)


def _said(names: Sequence[str], records: Sequence[Mapping[str, float]]) -> Results:
    """What the judge said, a name for each record."""
    kinds = {name: metric(name) for record in records for name in record if name not in ("step", "seconds", "reward")}
    values = {kind.title: [record.get(name) for record in records] for name, kind in kinds.items()}
    return Results(names, values, {kind.title: kind.better for kind in kinds.values()})


def run_verdict(history: History) -> Table | None:
    """The metrics that pages show first, at the start and at the end; None where none has moved."""
    names = [name for name in FIRST if name in history.series and name not in _NO_RESULTS]
    ends = {name: history.series[name].ends() for name in names}
    moved = [name for name in names if ends[name][0] != ends[name][1]]
    if not moved:
        return None
    values = {metric(name).title: ends[name] for name in moved}
    results = Results(["the start", "the end"], values, {metric(name).title: metric(name).better for name in moved})
    note = "Means over the first and the last tenth of the steps. Small numbers: the difference."
    return results.by_metric("Start and end, by the run's own metrics", note=note)


def _before_and_after(judged: Sequence[tuple[Mapping[str, float], Path]]) -> list[Gallery]:
    """The images of the judge's first and last strips, in pairs."""
    if len(judged) < 2:
        return []
    grids = {f"step {record['step']:.0f}": strip for record, strip in (judged[0], judged[-1])}
    picture = picture_of(judged[0][1])
    captions = [""] * ((picture.width + GAP) // (picture.height + GAP))
    return [gallery("Before and after: the same requests", grids, side=picture.height, captions=captions)]


def _evolution(judged: Sequence[tuple[Mapping[str, float], Path]]) -> Strips | None:
    """The judge's strips, each with its step and what the judge said; None where nothing has gone on."""
    if len(judged) < 2:
        return None
    names = [f"step {record['step']:.0f}" for record, _ in judged]
    cells = _said(names, [record for record, _ in judged]).cells()
    labels = [
        f"{name}: {', '.join(f'{kind} {row[i].text}' for kind, row in cells.items())}" for i, name in enumerate(names)
    ]
    return strips(
        "The same requests as training goes on", list(zip(labels, [strip for _, strip in judged], strict=True))
    )


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them: the first, the last, and others evenly between."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _command() -> str:
    """What this process was started by, without the folders of the machine's Python."""
    program = Path(sys.argv[0])
    is_own = program.name == "grpo" or program.parts[-2:] == ("grpo", "__main__.py")
    started = ["grpo"] if is_own else ["python", sys.argv[0]]
    return shlex.join([*started, *sys.argv[1:]])


def _commit() -> dict[str, str]:
    commit = code_commit()
    return {} if commit is None else {"Commit of the code": commit}


def _machine() -> dict[str, str]:
    found = environment()
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return {**{part.upper(): text for part, text in found["hardware"].items()}, "Versions": versions}
