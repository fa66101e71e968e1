"""What the learning benchmark found: rows with paired differences and intervals, as JSON, a table and plots."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo.environment import environment
from learning_plots import plot_all
from learning_rows import GUIDANCE, ROWS, Sizes

BOOTSTRAP = 4000
RIVALS = {"base, tuned guidance": "guided base", "more cross-entropy, tuned guidance": "guided CE"}
HEADS = {"fid": "FID", "accuracy": "accuracy"}  # of differences
COLUMNS = ("fid", "accuracy", "precision", "recall", "entropy", "gap")
Results = Mapping[str, Mapping[str, Any]]
Pair = tuple[int, int]  # seed of the base and of the training


class Measured(NamedTuple):
    """One cell's FID and accuracy, and those of each round of its bootstrap."""

    fid: float
    accuracy: float
    fid_rounds: np.ndarray
    accuracy_rounds: np.ndarray

    @classmethod
    def of(cls, cell: Mapping[str, Any]) -> "Measured":
        rounds = (np.asarray(cell[key]) for key in ("fid_rounds", "accuracy_rounds"))
        return cls(cell["fid"], cell["accuracy"], *rounds)


class Line(NamedTuple):
    """A row of the table: a cell of each pair of seeds. A base has the same cell under every training seed."""

    title: str
    looks: Mapping[Pair, str]
    trainings: Mapping[Pair, str]
    trained_as: str | None = None  # name in ROWS

    @property
    def plain(self) -> str | None:
        """The row that it is a change of, by its name in ROWS; a lever's only."""
        return None if self.trained_as is None else ROWS[self.trained_as].change_of


def report(folder: Path, name: str, results: Results, sizes: Sizes) -> None:
    """Write NAME.json, NAME.md and the plots into the folder."""
    lines = [line for line in table_lines(sizes) if any(look in results for look in line.looks.values())]
    rows = [row_of(line, results) for line in lines]
    by_title = {line.title: line for line in lines}
    for line, row in zip(lines, rows, strict=True):
        for rival, short in RIVALS.items():
            if rival in by_title and line.title != rival:
                row[f"against {short}"] = difference(line.looks, by_title[rival].looks, results)
        row["against the guided base at its accuracy"] = against_frontier(line.looks, results)
        if line.plain is not None and (plain := by_title.get(ROWS[line.plain].title)) is not None:
            row["against the plain row"] = None if plain == line else difference(line.looks, plain.looks, results)
    cells = {
        name: {key: value for key, value in result.items() if not key.endswith("_rounds")}
        for name, result in results.items()
    }
    found = {**environment(), "date": date.today().isoformat(), "sizes": vars(sizes), "rows": rows, "cells": cells}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(rows))
    print(markdown(rows))
    plot_all(folder, name, rows, results)


def table_lines(sizes: Sizes) -> list[Line]:
    """All rows that there may be, in the order of the table."""
    pairs = [(base, seed) for base in sizes.bases for seed in sizes.seeds]
    lines = [
        Line("base", {pair: f"look/base/{pair[0]}" for pair in pairs}, {}),
        Line("base, tuned guidance", {pair: f"guided/base/{pair[0]}" for pair in pairs}, {}),
    ]
    for name, row in ROWS.items():
        trainings = {(base, seed): f"{name}/{base}.{seed}" for base, seed in pairs if seed in sizes.seeds[: row.seeds]}
        kinds = [
            (row.title, f"look/{name}", row.shown),
            (f"{row.title}, average", f"look/{name} average", row.averaged),
        ]
        kinds.append((f"{row.title}, tuned guidance", "guided/ce", name == "ce"))
        for title, prefix, there in kinds:
            looks = {(base, seed): f"{prefix}/{base}.{seed}" for base, seed in trainings}
            lines += [Line(title, looks, trainings, name)] if there else []
    return lines


def row_of(line: Line, results: Results) -> dict[str, Any]:
    """Means over the pairs of seeds that are there."""
    cells = [results[look] for look in line.looks.values() if look in results]
    trainings = [results[name] for name in line.trainings.values() if name in results]
    row: dict[str, Any] = {"name": line.title, "pairs": len(cells), "forwards_per_image": cells[0]["forwards"]}
    row |= {"images": cells[0]["images"], **{key: float(np.mean([cell[key] for cell in cells])) for key in COLUMNS}}
    row |= {"fid_of_pairs": [cell["fid"] for cell in cells], "accuracy_of_pairs": [cell["accuracy"] for cell in cells]}
    row["points"] = [(cell["cfg_scale"], cell["temperature"]) for cell in cells]
    row["first_look"] = next(look for look in line.looks.values() if look in results)
    measured = {pair: Measured.of(results[look]) for pair, look in line.looks.items() if look in results}
    row["fid_interval"] = bootstrap({pair: (cell.fid, cell.fid_rounds) for pair, cell in measured.items()})
    if line.trained_as is not None:
        candidates = ROWS[line.trained_as].candidates
        tried = [results.get(f"look/{line.trained_as}:{place}", {}).get("fid") for place in range(len(candidates))]
        found = [fid for fid in tried if fid is not None]
        row["tuning"] = [{**candidate, "fid": fid} for candidate, fid in zip(candidates, tried, strict=True)]
        row["chosen"] = candidates[tried.index(min(found))] if found else candidates[0]
        row["steps"] = float(np.mean([cell["steps"] for cell in trainings])) if trainings else None
        row["cpu_seconds"] = time_of(line, results)
    return row


def time_of(line: Line, results: Results) -> float | None:
    """Mean CPU time of the row's trainings, those that they start from included, but the base; None where unknown."""
    total, name = 0.0, line.trained_as
    while name is not None:
        cells = [results[key] for base, seed in line.looks if (key := f"{name}/{base}.{seed}") in results]
        if not cells:
            return None
        total += float(np.mean([cell["cpu_seconds"] for cell in cells]))
        name = ROWS[name].start
    return total


def difference(looks: Mapping[Pair, str], rivals: Mapping[Pair, str], results: Results) -> dict[str, Any] | None:
    """FID and accuracy less the rival's of the same base and training seed; None where no pair is there."""
    pairs = [pair for pair in looks if looks[pair] in results and rivals.get(pair) in results]
    if not pairs:
        return None
    sides = {pair: (Measured.of(results[looks[pair]]), Measured.of(results[rivals[pair]])) for pair in pairs}
    fid = {pair: (own.fid - other.fid, own.fid_rounds - other.fid_rounds) for pair, (own, other) in sides.items()}
    accuracy = {
        pair: (own.accuracy - other.accuracy, own.accuracy_rounds - other.accuracy_rounds)
        for pair, (own, other) in sides.items()
    }
    return {"fid": summary(fid), "accuracy": summary(accuracy), "pairs": len(pairs)}


def against_frontier(looks: Mapping[Pair, str], results: Results) -> dict[str, Any] | None:
    """FID less that of the guided base where guidance is such that both have the same accuracy.

    Between the measured points of guidance FID is taken to be linear in the accuracy; beyond the last one it is that of
    the last one, which favours the base.
    """
    fid = {}
    for pair, look in looks.items():
        names = [f"frontier/base/{pair[0]}/{scale}" for scale in GUIDANCE]
        if look not in results or any(name not in results for name in names):
            continue
        own, points = Measured.of(results[look]), [Measured.of(results[name]) for name in names]
        there = frontier_at(own.accuracy, [point.accuracy for point in points], [point.fid for point in points])
        in_rounds = [
            frontier_at(
                accuracy, [point.accuracy_rounds[r] for point in points], [point.fid_rounds[r] for point in points]
            )
            for r, accuracy in enumerate(own.accuracy_rounds)
        ]
        fid[pair] = own.fid - there, own.fid_rounds - np.asarray(in_rounds)
    return {"fid": summary(fid), "pairs": len(fid)} if fid else None


def frontier_at(accuracy: float, accuracies: Sequence[float], fids: Sequence[float]) -> float:
    """FID of the frontier at an accuracy."""
    order = np.argsort(accuracies)
    return float(np.interp(accuracy, np.asarray(accuracies)[order], np.asarray(fids)[order]))


def summary(values: Mapping[Pair, tuple[float, np.ndarray]]) -> dict[str, Any]:
    """Mean, 95 % interval, and the single pairs."""
    alone = {f"{base}.{seed}": value for (base, seed), (value, _) in values.items()}
    return {"mean": float(np.mean(list(alone.values()))), "interval": bootstrap(values), "pairs": alone}


def bootstrap(values: Mapping[Pair, tuple[float, np.ndarray]]) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of the mean over pairs, resampled at three levels.

    Bases are drawn with replacement, of each its training seeds, and of each draw of a base a round of the bootstrap
    over image numbers, whose deviation from the mean of the rounds is added to what was measured.
    """
    random = np.random.default_rng(0)
    bases = sorted({base for base, _ in values})
    seeds = {base: [seed for other, seed in values if other == base] for base in bases}
    count = len(next(iter(values.values()))[1])
    means = []
    for _ in range(BOOTSTRAP):
        drawn = []
        for base in random.choice(bases, len(bases)):
            r = random.integers(count)
            for seed in random.choice(seeds[base], len(seeds[base])):
                value, rounds = values[base, seed]
                drawn.append(value + rounds[r] - rounds.mean())
        means.append(np.mean(drawn))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The two tables of docs/learning.md: the ways to train against guidance, and levers against their plain row."""
    levers = [row for row in rows if "against the plain row" in row]
    rivals = {f"against {short}": short for short in RIVALS.values()}
    at_accuracy = {"against the guided base at its accuracy": "guided base at its accuracy"}
    ways = [row for row in rows if row not in levers]
    return f"{table(ways, rivals, at_accuracy)}\n{table(levers, {'against the plain row': 'plain'}, {})}"


def table(rows: Sequence[Mapping[str, Any]], rivals: Mapping[str, str], fid_only: Mapping[str, str]) -> str:
    """Rows with their differences to rivals: by the key that a row has them under, and by the name in the head."""
    columns = [(key, what, f"{head} - {name}") for key, name in rivals.items() for what, head in HEADS.items()]
    columns += [(key, "fid", f"FID - {name}") for key, name in fid_only.items()]
    heads = ["row", "forwards", "pairs", "CPU s", "FID", "accuracy", "recall", *(head for _, _, head in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        seconds = f"{row['cpu_seconds']:.0f}" if row.get("cpu_seconds") else "-"
        low, high = row["fid_interval"]
        cells = [row["name"], row["forwards_per_image"], row["pairs"], seconds]
        cells += [f"{row['fid']:.3f} [{low:.3f}, {high:.3f}]", f"{row['accuracy']:.3f}", f"{row['recall']:.3f}"]
        cells += [written((found := row.get(key)) and found[what]) for key, what, _ in columns]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def written(found: Mapping[str, Any] | None) -> str:
    """A difference, its interval, and in how many of the pairs it is below 0."""
    if found is None:
        return "-"
    low, high = found["interval"]
    below = sum(value < 0 for value in found["pairs"].values())
    return f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}] {below}/{len(found['pairs'])}"
