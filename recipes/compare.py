"""Runs, or results of `grpo evaluate`, side by side.

grpo compare runs/one runs/two runs/three --html compare.html
grpo compare base.json tuned.json
grpo compare base.json tuned.json --allow images.sampler.cfg_scale

Of runs, by their folders: what differs in their recipes, their metrics at the end, what their judges said, and the
result files in their folders. Runs that differ in seeds only have their mean with a 95 % interval.
Of result files: every metric with its difference to the first. Results that were not measured alike are refused.

--allow KEY,...     settings of a measurement that may differ
--html FILE         also write one page with the tables, overlaid curves and samples of the same step (of runs)
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("compare")

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from grpo.config import UserError, printable, writing
from grpo.evaluation import Result, make_writable, read_result, require_comparable, shown, unequal_settings
from grpo.observe import (
    Run,
    Table,
    end_table,
    judge_table,
    numbers_table,
    read_run,
    recipe_table,
    table_lines,
    write_comparison,
)


def main(arguments: Sequence[str]) -> None:
    """Print the tables that the command line asks for, and write the page."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("places", nargs="*")
    parser.add_argument("--allow", default="")
    parser.add_argument("--html")
    try:
        own, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if unknown:
        raise UserError(f"{unknown[0]}: unknown flag; grpo compare --help tells them")
    if len(own.places) < 2:
        raise UserError("grpo compare takes at least two folders of runs, or two result files of grpo evaluate")
    if gone := [place for place in own.places if not os.path.exists(place)]:
        raise UserError(f"{gone[0]}: there is no such folder or file")
    folders = [os.path.isdir(place) for place in own.places]
    if any(folders) and not all(folders):
        other = own.places[folders.index(False)]
        raise UserError(f"{other} is not the folder of a run: runs are compared with runs, and results with results")
    allowed = [key for key in own.allow.split(",") if key]
    if all(folders):
        compare_runs(own.places, allowed=allowed, html=own.html)
    elif own.html is not None:
        raise UserError("--html is for runs: give their folders")
    else:
        results = [read_result(path) for path in own.places]
        require_comparable(results, allowed=allowed)
        print_results(results)


def compare_runs(folders: Sequence[str], *, allowed: Sequence[str], html: str | None) -> None:
    """Tables of runs on the terminal, and everything on a page."""
    if html is not None:
        make_writable(html, key="--html")
    short = [Path(folder).resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else folders
    runs = [read_run(folder, name=str(name)) for folder, name in zip(folders, names, strict=True)]
    found = [recipe_table(runs), end_table(runs), judge_table(runs), *result_tables(runs, allowed=allowed)]
    tables = [table for table in found if table is not None]
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    for table in tables:
        print(*table_lines(table, width), "", sep="\n")
    if html is not None:
        with writing(f"--html {html}"):
            write_comparison(html, runs, tables)
        print(printable(f"written to {html}"))


def result_tables(runs: Sequence[Run], *, allowed: Sequence[str]) -> list[Table]:
    """A table for each result file, by its name, that is in the folders of several runs."""
    tables = []
    for name in sorted({path.name for run in runs for path in run.folder.glob("*.json")}):
        results = [_result_in(run, name) for run in runs]
        found = [result for result in results if result is not None]
        if len(found) < 2:
            continue
        unequal = unequal_settings(found, allowed=allowed)
        note = "" if not unequal else "Not measured alike: " + "; ".join(
            f"{key}: {', '.join(map(shown, values))}" for key, values in unequal.items()
        )  # fmt: skip
        values = {
            f"{judge} {metric}": [result and result.metrics.get(judge, {}).get(metric) for result in results]
            for judge, metrics in found[0].metrics.items()
            for metric in metrics
            if not unequal
        }
        tables.append(numbers_table(name, runs, values, note=note))
    return tables


def _result_in(run: Run, name: str) -> Result | None:
    """A result file of a run's folder; None where there is none, or something else of that name."""
    try:
        return read_result(run.folder / name, name=run.name)
    except UserError:
        return None


def print_results(results: Sequence[Result]) -> None:
    """A table for each judge, and what differs in how the results were measured."""
    print(*(f"[{number}] {printable(result.name)}" for number, result in enumerate(results, 1)), sep="\n")
    for key, values in unequal_settings(results).items():
        print(f"    {key}: {', '.join(map(shown, values))}")
    for judge in dict.fromkeys(judge for result in results for judge in result.metrics):
        print(f"\n{judge}")
        columns = [result.metrics.get(judge, {}) for result in results]
        for metric in dict.fromkeys(metric for column in columns for metric in column):
            print_row(metric, [column.get(metric) for column in columns])


def print_row(metric: str, values: Sequence[float | None]) -> None:
    """The values of a metric, and how far each is from the first."""
    first, *others = values
    cells = [f"{'-' if first is None else format(first, '.6g'):>12}"]
    for value in others:
        difference = "" if value is None or first is None else f"({value - first:+.3g})"
        cells.append(f"{'-' if value is None else format(value, '.6g'):>12} {difference:<11}")
    print(f"  {metric:<20}{''.join(cells)}".rstrip())
