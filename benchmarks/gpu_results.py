"""Writes docs/gpu_results.md: what is wanted of a GPU, what was expected before it was measured, and what was measured.

python benchmarks/gpu_results.py                       # from the JSON files in benchmarks/results
python benchmarks/gpu_results.py --checks FOLDER FILE  # into FILE, the steps and tests of a folder of gpu.sh
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_linear_log_probs
import bench_loss
import bench_sampling
import bench_token_log_probs

from grpo.environment import environment
from harness import Result, Target

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu_results.md"


def of_images(images: int, value):
    """A value of the rollout of so many images."""
    return lambda content: value({batch["images"]: batch for batch in content["batches"]}[images])


ROLLOUT = (
    Target("seconds for 8 guided images", of_images(8, lambda b: b["sides"]["ours"]["seconds"]), 1.2, True, "1.05-1.2"),
    Target(
        "256 images, share of the bandwidth's floor",
        of_images(256, lambda b: b["share_of_bandwidth"]),
        0.5,
        expected="0.4",
    ),
)
RUN = (
    Target(
        "minutes of the published run",
        lambda c: c["run_minutes"]["ours"],
        8,
        True,
        "8.8 +- 25 %, of which dropout and LPIPS 1.7",
    ),
    Target("peak, GB", lambda c: c["sides"]["ours"]["whole_peak_bytes"] / 1e9, 80, True, "47-55"),
    Target("MFU of the update", lambda c: c["sides"]["ours"]["shares"]["mfu/update"], 0.45, expected="0.43"),
)
BENCHMARKS: Mapping[str, tuple[str, Sequence[Target]]] = {
    "run": ("The published run: GPT-XXL, 384 px, 128 images and 1,024 completions a step (`bench_run.py`)", RUN),
    "rollout": ("Autoregressive sampling of GPT-XXL, 384 px, with guidance (`bench_rollout.py`)", ROLLOUT),
    "sampling": ("Draws from 512 rows of 16384 logits (`bench_sampling.py`)", bench_sampling.TARGETS),
    "token_log_probs": (
        "Log-probs of 65536 rows of 16384 logits (`bench_token_log_probs.py`)",
        bench_token_log_probs.TARGETS,
    ),
    "linear_log_probs": (
        "Log-probs under a projection, 65536 rows of D = 1536 (`bench_linear_log_probs.py`)",
        bench_linear_log_probs.TARGETS,
    ),
    "loss": ("Policy loss of 65536 tokens (`bench_loss.py`)", bench_loss.TARGETS),
}
PUBLISHED_PRESETS = ("vapi-xxl-384", "xxl-384", None)  # what targets are for; kernels have none
INTRODUCTION = """# Results on GPUs

Made by `python benchmarks/gpu_results.py` from the files in `benchmarks/results`; `benchmarks/gpu.sh` measures.
Expected is what was written down before the measurement; - is what was not measured. A target that was measured more
than once, after changes to the code, has a line for each time, the latest last. "Speed of" is their time over ours.
"""


def page(folder: Path = RESULTS) -> str:
    """The text."""
    parts = [INTRODUCTION, *checks(folder), *variants(folder)]
    for name, (title, targets) in BENCHMARKS.items():
        rows = [line for target in targets for line in target_lines(target, measurements(folder, name))]
        columns = "| target | wanted | expected | measured | | date | hardware | versions |"
        parts.append("\n".join([f"## {title}", "", columns, "|---|---|---|---|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def measurements(folder: Path, name: str) -> list[dict[str, Any]]:
    """The contents of a benchmark's files of GPUs at the sizes of its targets, the oldest first."""
    files = [file for file in folder.glob("*-gpu-*.json") if file.stem.partition("-gpu-")[2] == name]
    contents = [
        json.loads(file.read_text()) for file in sorted(files, key=lambda file: file.stem.partition("-gpu-")[0])
    ]
    of_gpus = [content for content in contents if "gpu" in content["hardware"]]
    return [content for content in of_gpus if content.get("preset") in PUBLISHED_PRESETS]


def target_lines(target: Target, contents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each measurement, or one without."""
    found = False
    for content in contents:
        kept = [held for held in content.get("targets", []) if held["what"] == target.what]
        held = kept[0] if kept else target.held_against(results_of(content))
        if held["figure"] is None:
            continue
        found, met = True, "reached" if held["met"] else "missed"
        cells = [
            target.what,
            held["wanted"],
            held["expected"] or "-",
            f"**{held['figure']:.3g}**",
            met,
            *origin(content),
        ]
        yield f"| {' | '.join(cells)} |"
    if not found:
        held = target.held_against({})
        yield f"| {target.what} | {held['wanted']} | {held['expected'] or '-'} | - | | | | |"


def results_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a target takes its figure from: the cases of a kernel by name, or all that a whole job measured."""
    return {case["name"]: Result(**case) for case in content["cases"]} if "cases" in content else content


def origin(content: Mapping[str, Any]) -> tuple[str, str, str]:
    """Date, hardware, versions."""
    versions = content["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if name in versions)
    return content["date"], content["hardware"]["gpu"], named


def checks(folder: Path) -> list[str]:
    """Tests and programs that were run on a GPU."""
    lines = []
    for content in measurements(folder, "checks"):
        day, hardware, versions = origin(content)
        lines += [
            f"| {step['what']} | {step['result']} | {day} | {hardware} | {versions} |" for step in content["steps"]
        ]
    return [
        "\n".join(
            ["## Checks", "", "| what | result | date | hardware | versions |", "|---|---|---|---|---|", *lines, ""]
        )
    ]


def variants(folder: Path) -> Iterator[str]:
    """Settings of a step beside one another: seconds, and of the update its share of the peak and the memory."""
    for content in measurements(folder, "variants"):
        images, (day, hardware, versions) = content["images"], origin(content)
        parts = content["variants"]
        lines = [
            f"## Settings of the published run's step (`bench_variants.py`): {day}, {hardware}, {versions}",
            "",
            f"| {images} images: blocks, recomputation, images at once | rollout s | update s | its MFU | peak GB |",
            "|---|---|---|---|---|",
        ]
        for name, run in {**parts.get("updates", {}), **parts.get("more updates", {})}.items():
            numbers = [run["rollout"], run["update"], run["mfu/update"], run["peak_gb"]]
            lines.append(f"| {name} | {' | '.join(f'{number:.3g}' for number in numbers)} |")
        lines += ["", "| 1,024 completions: decoder, completions at once | decode s | LPIPS s |", "|---|---|---|"]
        for name, run in {**parts.get("decoders", {}), **parts.get("small decoders", {})}.items():
            lines.append(f"| {name} | {run['decode']:.3g} | {run['reward/lpips']:.3g} |")
        lines += ["", "| 128 images: encoder | encode s |", "|---|---|"]
        lines += [f"| {name} | {run['seconds']:.3g} |" for name, run in parts.get("encoders", {}).items()]
        yield "\n".join([*lines, ""])


def collect(folder: Path) -> dict[str, Any]:
    """The steps of summary.txt in a results folder of gpu.sh, with the numbers of tests where there are some."""
    steps = []
    for name, code, seconds in re.findall(
        r"^== (\S+): exit code (\d+), (\d+) of", (folder / "summary.txt").read_text(), re.M
    ):
        result = "done" if code == "0" else f"exit code {code}"
        if (tests := folder / f"{name}.xml").exists():
            suite = ElementTree.parse(tests).getroot().find("testsuite").attrib  # our own pytest wrote it
            bad, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
            result = f"{int(suite['tests']) - bad - skipped} passed, {bad} failed, {skipped} skipped"
        steps.append({"what": name, "result": f"{result}, {seconds} s"})
    return {**environment(), "date": date.today().isoformat(), "steps": steps}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checks", nargs=2, type=Path, metavar=("FOLDER", "FILE"))
    options = parser.parse_args()
    if options.checks:
        folder, file = options.checks
        file.write_text(json.dumps(collect(folder), indent=1) + "\n")
    else:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
