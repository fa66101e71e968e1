"""The plots of the learning benchmark."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.observe import labelled_strips
from learning_rows import GUIDANCE, ROWS, picture_of

COLORS = {1: "tab:blue", 2: "tab:orange"}  # by forwards an image
Results = Mapping[str, Mapping[str, Any]]


def plot_all(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], results: Results) -> None:
    """NAME-fid.png, NAME-frontier.png, NAME-curves.png and NAME-samples.png, as far as there is something to show."""
    samples(folder, name, rows)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for plot in (fids, frontier, curves):
        figure = plot(pyplot, rows, results)
        figure.savefig(folder / f"{name}-{plot.__name__}.png", dpi=80)
        pyplot.close(figure)


def fids(pyplot: Any, rows: Sequence[Mapping[str, Any]], results: Results) -> Any:
    """FID of each row with its interval; colour says how many forwards an image takes."""
    figure, axis = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        color = COLORS[row["forwards_per_image"]]
        low, high = row["fid_interval"]
        axis.plot([low, high], [place, place], color=color)
        axis.plot(row["fid_of_pairs"], [place] * len(row["fid_of_pairs"]), "o", markersize=2, color=color)
        axis.plot([row["fid"]], [place], "D", color=color)
    axis.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axis.set(xlabel="FID in the judge's features, split test\nblue: one forward an image, orange: two")
    axis.grid(alpha=0.3)
    return figure


def frontier(pyplot: Any, rows: Sequence[Mapping[str, Any]], results: Results) -> Any:
    """FID against accuracy: rows, and the base and longer trained base under rising guidance."""
    figure, axis = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    for model, style in (("base", "-"), ("ce", "--")):
        points = []
        for scale in GUIDANCE:
            cells = [
                cell
                for name, cell in results.items()
                if name.startswith(f"frontier/{model}/") and name.endswith(f"/{scale}")
            ]
            if cells:
                points.append([np.mean([cell[key] for cell in cells]) for key in ("accuracy", "fid")])
        if points:
            label = {"base": "base, guided 1.25 to 2", "ce": "more cross-entropy, guided 1.25 to 2"}[model]
            axis.plot(*zip(*points, strict=True), style, marker=".", color=COLORS[2], label=label)
    for place, row in enumerate(row for row in rows if row["forwards_per_image"] == 1):
        low, high = row["fid_interval"]
        errors = [[max(row["fid"] - low, 0)], [max(high - row["fid"], 0)]]
        spread = np.std(row["accuracy_of_pairs"])
        style = {"marker": "osD^v<>Pp*hX"[place % 12], "color": f"C{place % 10}", "capsize": 2, "linewidth": 0.8}
        axis.errorbar(row["accuracy"], row["fid"], yerr=errors, xerr=spread, label=row["name"], **style)
    axis.set(xlabel="accuracy by the judge", ylabel="FID in the judge's features, split test")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curves(pyplot: Any, rows: Sequence[Mapping[str, Any]], results: Results) -> Any:
    """Loss or reward of each row over its CPU time, one line a training."""
    trained = {
        name: [key for key in results if key.startswith(f"{name}/") and "curve" in results[key]] for name in ROWS
    }
    trained = {name: keys for name, keys in trained.items() if keys}
    height = -(-max(len(trained), 1) // 4)
    figure, axes = pyplot.subplots(height, 4, figsize=(13, 2.6 * height), layout="constrained", squeeze=False)
    for axis, (name, keys) in zip(axes.flat, trained.items(), strict=False):
        for key in keys:
            curve = results[key]["curve"]
            what = "reward_mean" if "reward_mean" in curve else "loss"
            axis.plot(curve["step"], curve[what], linewidth=0.8)
            axis.set_ylabel({"reward_mean": "reward"}.get(what, what), fontsize=7)
        axis.set_title(ROWS[name].title, fontsize=7)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(trained) :]:
        axis.axis("off")
    return figure


def samples(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same twenty images of each row, of the first pair of seeds."""
    strips = [(row["name"], picture_of(folder, row["first_look"])) for row in rows]
    strips = [strip for strip in strips if strip[1].exists()]
    if strips:
        labelled_strips(strips).save(folder / f"{name}-samples.png")
