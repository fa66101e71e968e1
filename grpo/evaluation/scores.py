"""What published scorers of prompts have written, read back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from grpo.config import UserError, printable, read_text, reading, text_lines

DPG_TOTAL = "DPG-Bench score"


def read_scores(path: str | Path) -> tuple[str, dict[str, float]]:
    """Name of the benchmark, and its scores by name, from the file that its scorer writes.

    GenEval (arXiv 2310.11513), results.jsonl, an object an image: overall, the mean over its tasks of the share of
    correct images, each task by its tag, and over all tasks correct_images and correct_prompts (any image of a prompt),
    as its `summary_scores.py` has them. DPG-Bench (arXiv 2403.05135), the results' .txt: overall, and its categories,
    in percent.

    Raises:
        UserError: neither, or damaged.
    """
    path = Path(path)
    with reading(f"evaluation.scores {path} cannot be read"):
        text = read_text(path)
    if path.suffix == ".jsonl":
        return "geneval", _geneval(text, path)
    if DPG_TOTAL in text:
        return "dpg_bench", _dpg(text, path)
    raise UserError(
        f"evaluation.scores {path} is neither GenEval's results.jsonl nor DPG-Bench's results with its score"
    )


def _geneval(text: str, path: Path) -> dict[str, float]:
    tasks: dict[str, list[float]] = {}
    prompts: dict[str, bool] = {}
    with reading(f"evaluation.scores {path} is not GenEval's results"):
        for line in filter(str.strip, text_lines(text)):
            entry = json.loads(line)
            correct = entry["correct"]
            if type(correct) is not bool:
                raise ValueError(f"correct is {correct!r}, not true or false")
            tasks.setdefault(str(entry["tag"]), []).append(float(correct))
            prompt = str(entry["metadata"])
            prompts[prompt] = prompts.get(prompt, False) or correct
        if not tasks:
            raise ValueError("it has no images")
        images = [correct for values in tasks.values() for correct in values]
        of_task = {tag: fmean(correct) for tag, correct in tasks.items()}
        totals = {"overall": fmean(of_task.values()), "correct_images": fmean(images)}
        totals |= {"correct_prompts": fmean(map(float, prompts.values()))}
        totals |= {"images": float(len(images)), "prompts": float(len(prompts))}
        return _with_parts(totals, of_task)


def _dpg(text: str, path: Path) -> dict[str, float]:
    """The summary behind the lines of the images: the total and, in indented lines, categories.

    One of which nothing was asked has the score nan there, and is left out.
    """
    found, total = {}, math.nan
    with reading(f"evaluation.scores {path} is not DPG-Bench's results"):
        for line in text_lines(text[text.rfind("\nModel:") + 1 :]):
            name, _, value = line.rpartition(":")
            if name == DPG_TOTAL:
                total = float(value)
            elif name[:1].isspace() and value.strip():
                found[name.strip()] = float(value)
        if not math.isfinite(total):
            raise UserError(f"evaluation.scores {path} has no {DPG_TOTAL} that is a number: let the scorer end first")
        return _with_parts({"overall": total}, {name: value for name, value in found.items() if math.isfinite(value)})


def _with_parts(totals: Mapping[str, float], parts: Mapping[str, float]) -> dict[str, float]:
    """Both, by names that can be shown. Raises a ValueError where a part has the name of a total."""
    parts = {printable(name): value for name, value in parts.items()}
    if both := totals.keys() & parts.keys():
        raise ValueError(f"a part of it has the name {min(both)}, which is that of a total")
    return {**totals, **parts}
