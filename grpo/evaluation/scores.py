"""What published scorers of prompts have written, read back."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from grpo.config import UserError, read_text, reading, text_lines

DPG_LINE = re.compile(r"\s*(?P<name>.+?):\s*(?P<score>[-+.\deE]+|nan)\s*")
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
    of_task = {tag: fmean(correct) for tag, correct in tasks.items()}
    images = [correct for values in tasks.values() for correct in values]
    totals = {"overall": fmean(of_task.values()), "correct_images": fmean(images)}
    return {**totals, "correct_prompts": fmean(map(float, prompts.values())), **of_task, **_counts(images, prompts)}


def _counts(images: list[float], prompts: Mapping[str, bool]) -> dict[str, float]:
    return {"images": float(len(images)), "prompts": float(len(prompts))}


def _dpg(text: str, path: Path) -> dict[str, float]:
    """Lines of the summary behind the lines of the images; the words before a colon name a category."""
    summary = text[text.rindex("Model:") :] if "Model:" in text else text
    found = {}
    for line in text_lines(summary):
        if match := DPG_LINE.fullmatch(line):
            with reading(f"evaluation.scores {path} is not DPG-Bench's results"):
                found[match["name"].strip()] = float(match["score"])
    total = found.pop(DPG_TOTAL, math.nan)
    if not math.isfinite(total):
        raise UserError(f"evaluation.scores {path} has no {DPG_TOTAL} that is a number: let the scorer end first")
    return {"overall": total, **found}
