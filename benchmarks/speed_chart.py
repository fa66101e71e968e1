"""The speed chart of the README, from the committed results: `python benchmarks/speed_chart.py`. Needs matplotlib."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures" / "speed.png"


def bars() -> list[tuple[str, float]]:
    """What was compared in one run on one machine, and how many times faster it was here."""
    update, run, rollout = (
        json.loads((RESULTS / f"2026-11-{name}.json").read_text())
        for name in ("24-cpu-update", "26-0914-gpu-run", "26-gpu-rollout")
    )
    sampling = next(batch for batch in rollout["batches"] if batch.get("speedup") is not None)
    return [
        ("sampling and update of a step\nagainst the reference algorithm, 2 CPU cores", update["speedup"]),
        ("sampling 8 guided images, GPT-XXL, 384 px\nagainst LlamaGen's sampler, H200", sampling["speedup"]),
        ("the published run, GPT-XXL, rewards included\nagainst the reference algorithm, H200", run["speedup"]),
    ]


def main() -> None:
    """Draw one bar a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 12})
    names, times = zip(*reversed(bars()), strict=True)
    figure, axis = pyplot.subplots(figsize=(8, 2.8), layout="constrained")
    drawn = axis.barh(names, times, color="tab:blue", height=0.55)
    axis.bar_label(drawn, labels=[f"{value:.1f}x" for value in times], padding=4, fontsize=14)
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set(xlim=(0, max(times) * 1.15), xlabel="times faster, measured side by side in one run")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main()
