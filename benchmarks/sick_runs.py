"""The pictures of docs/curves.md: a healthy run of the quickstart's GRPO and three sick ones, really trained.
And two of the README: what the quickstart draws before and after, and curves of the healthy run.

    python benchmarks/sick_runs.py [--base runs/quickstart] [--folder runs/sick] [--pictures docs/pictures]

Needs what `grpo quickstart` has left in --base, to be started in the same folder as that, and matplotlib. About two
minutes a run on one core; a run that is finished is not done again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

STEPS, INTERVAL = 60, 10
CAUSES: Mapping[str, Mapping[str, object]] = {
    "healthy": {},
    "hacked": {
        "reward.class_log_prob.checkpoint": "{folder}/weak/model.safetensors",
        "objective.aux_ce_weight": 0,
        "optimizer.schedule": "constant",
        "optimizer.lr": 6e-4,
    },
    "collapsed": {
        "reward.class_log_prob.weight": 0,
        "reward.jpeg_size.weight": 1,
        "objective.aux_ce_weight": 0,
        "optimizer.schedule": "constant",
        "optimizer.lr": 4e-4,
    },
    "rate": {"optimizer.lr": 5e-3},
}
"""Name of a run -> what its recipe has in place of the healthy one's."""
PANELS = {"reward_mean": "reward", "entropy": "entropy, nats", "grad_norm": "gradient norm", "judge/fid": "judge's FID"}


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--folder", type=Path, default=Path("runs/sick"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    given = parser.parse_args()
    weak = ["classifier", "--config", "quickstart/classifier_reward", "--training.steps", "20"]
    finish(given.folder / "weak", weak)  # a reward that is easily deceived: a network that has learned next to nothing
    for name, cause in CAUSES.items():
        flags = common(given.base) | cause
        words = [word for key, value in flags.items() for word in (f"--{key}", f"{value}".format(folder=given.folder))]
        finish(given.folder / name, ["train", "--config", "quickstart/grpo", *words])
    given.pictures.mkdir(parents=True, exist_ok=True)
    healthy = history(given.folder / "healthy")
    for name in CAUSES:
        draw(given.folder / name, healthy, given.pictures / f"curves-{name}.png")
    curve(healthy, given.pictures / "curve.png")
    before_after(given.base, given.folder, given.pictures / "before_after.png")


def common(base: Path) -> dict[str, object]:
    """Keys of GRPO from the quickstart's pre-trained model, with a judge."""
    judge = {
        "interval": INTERVAL,
        "feature_checkpoint": base / "classifier_judge/model.safetensors",
        "num_images": 500,
        "batch_size": 250,
        "split": "validation",
        "max_time_share": 1,
    }
    return {
        "model.checkpoint": base / "pretrain/model.safetensors",
        "tokenizer.checkpoint": base / "tokenizer/model.safetensors",
        "reward.class_log_prob.checkpoint": base / "classifier_reward/model.safetensors",
        "objective.aux_ce_weight": 0.1,  # as docs/curves.md says; what the quickstart has may change
        "training.steps": STEPS,
        "metrics.image_interval": 0,
        **{f"judge.{key}": value for key, value in judge.items()},
    }


def finish(run_dir: Path, arguments: Sequence[str]) -> None:
    """Start a job, or go on with it, unless its weights are there."""
    if not (run_dir / "model.safetensors").exists():
        subprocess.run([sys.executable, "-m", "grpo", *arguments, "--metrics.run_dir", str(run_dir)], check=True)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """A run's steps, after what the judge said before the first one."""
    first = json.loads((run_dir / "judge.json").read_text())[0]
    before = {"step": 0, "judge/fid": first["fid"], "judge/accuracy": first["accuracy"]}
    return [before, *map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]


def plots() -> Any:
    """matplotlib's interface, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 14, "axes.titlesize": 14})
    return pyplot


def points(lines: Sequence[Mapping[str, Any]], metric: str) -> list[list[float]]:
    """Steps and values of a metric, where it is there."""
    there = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    return [list(side) for side in zip(*there, strict=True)]


def curve(steps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward of a run, and what the judge says meanwhile."""
    figure, axes = plots().subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    titles = {"reward_mean": "reward", "judge/accuracy": "judge's accuracy", "judge/fid": "judge's FID"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        axis.plot(*points(steps, metric), color="tab:blue", linewidth=2)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """As a PNG of few colours, which is a third as large."""
    figure.savefig(path, dpi=80)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def draw(run_dir: Path, healthy: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Four curves beside the healthy run's in grey, and the judge's samples of the same seeds below."""
    pyplot = plots()
    strips = pyplot.imread(run_dir / "samples" / "evolution.png")
    width = 8.0
    high = width * strips.shape[0] / strips.shape[1]
    figure = pyplot.figure(figsize=(width, 5.2 + high), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=[5.2, high])
    steps = history(run_dir)
    for axis, (metric, title) in zip(above.subplots(2, 2).flat, PANELS.items(), strict=True):
        if metric != "reward_mean" or run_dir.name == "rate":  # the others have rewards of another scale
            axis.plot(*points(healthy, metric), color="0.65")
        axis.plot(*points(steps, metric), color="tab:blue", linewidth=2.2)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axis = below.subplots()
    axis.imshow(strips)
    axis.axis("off")
    save(figure, path)
    pyplot.close(figure)


def before_after(base: Path, folder: Path, path: Path) -> None:
    """Samples of the quickstart's generator before guidance-free training and GRPO, and after; the same seeds."""
    from grpo.observe import labelled_strips

    grids = {"before: pre-trained": "pretrain", "after guidance-free training and GRPO": "grpo"}
    for phase in grids.values():
        output = {"grid": folder / f"{phase}.png", "num_images": 30, "grid_columns": 10}
        flags = [word for key, value in output.items() for word in (f"--output.{key}", str(value))]
        subprocess.run([sys.executable, "-m", "grpo", "generate", str(base / phase), *flags], check=True)
    labelled_strips([(label, folder / f"{phase}.png") for label, phase in grids.items()]).save(path)


if __name__ == "__main__":
    main()
