"""Results side by side: files of `grpo evaluate` that were measured alike, with their differences.

grpo compare base.json tuned.json
grpo compare base.json tuned.json --allow images.sampler.cfg_scale

--allow KEY,...     settings that may differ; without it, results that were not measured alike are refused
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("compare")

import argparse
from collections.abc import Sequence

from grpo.config import UserError
from grpo.evaluation import Result, read_result, require_comparable, shown, unequal_settings


def main(arguments: Sequence[str]) -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("results", nargs="*")
    parser.add_argument("--allow", default="")
    try:
        own, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if unknown:
        raise UserError(f"{unknown[0]}: unknown flag; grpo compare --help tells them")
    if len(own.results) < 2:
        raise UserError("grpo compare takes at least two result files of grpo evaluate")
    results = [read_result(path) for path in own.results]
    allowed = [key for key in own.allow.split(",") if key]
    require_comparable(results, allowed=allowed)
    print_results(results)


def print_results(results: Sequence[Result]) -> None:
    """A table for each judge, and what differs in how the results were measured."""
    print(*(f"[{number}] {result.name}" for number, result in enumerate(results, 1)), sep="\n")
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
        known = value is not None and first is not None
        difference = f"({value - first:+.3g})" if known else ""
        cells.append(f"{'-' if value is None else format(value, '.6g'):>12} {difference:<11}")
    print(f"  {metric:<20}{''.join(cells)}".rstrip())
