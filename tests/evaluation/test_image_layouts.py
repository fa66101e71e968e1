"""Folders as GenEval's and DPG-Bench's scorers read them, and their results read back."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import Output, UserError
from grpo.evaluation import build_layout, read_scores
from grpo.texts import Prompt

PIXELS = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 6, 6) * 30


def test_geneval_folders_are_read_as_its_scorer_does(tmp_path):
    about = [{"tag": "counting", "include": [{"class": "dog", "count": n}], "prompt": f"{n} dogs"} for n in (2, 3)]
    prompts = [Prompt(entry["prompt"], str(number), entry) for number, entry in enumerate(about) for _ in range(4)]
    save = build_layout(Output(folder=str(tmp_path), layout="geneval"), prompts)
    for part in (slice(0, 3), slice(3, 8)):  # batches need not end where a prompt's images do
        save(PIXELS[part], torch.arange(8)[part])
    seen = {}
    for subfolder in os.listdir(tmp_path):  # as evaluate_images.py walks
        assert subfolder.isdigit()
        with open(tmp_path / subfolder / "metadata.jsonl") as file:
            assert json.load(file) == about[int(subfolder)]
        for name in os.listdir(tmp_path / subfolder / "samples"):
            assert re.match(r"\d+\.png", name)
            with Image.open(tmp_path / subfolder / "samples" / name) as image:
                seen[int(subfolder), int(name[:-4])] = np.asarray(image)[0, 0, 0]
    assert seen == {(number // 4, number % 4): 30 * number for number in range(8)}
    with pytest.raises(UserError, match="'a dog' has no tag"):
        build_layout(Output(folder=str(tmp_path), layout="geneval"), [Prompt("a dog", "0", {"prompt": "a dog"})])


def test_dpg_files_are_cropped_as_its_scorer_does(tmp_path):
    prompts = [Prompt("x", name, {}) for name in ("partiprompts12", "7") for _ in range(4)]
    build_layout(Output(folder=str(tmp_path), layout="dpg"), prompts)(PIXELS, torch.arange(8))
    assert sorted(os.listdir(tmp_path)) == ["7.png", "partiprompts12.png"]
    side = 6
    boxes = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    for first, name in ((0, "partiprompts12"), (4, "7")):
        with Image.open(tmp_path / f"{name}.png") as image:
            found = [set(np.asarray(image.crop(box)).ravel().tolist()) for box in boxes]
        assert found == [{30 * (first + place)} for place in range(4)]
    with pytest.raises(UserError, match=r"'../x' cannot be the name of a file"):
        build_layout(Output(folder=str(tmp_path), layout="dpg"), [Prompt("x", "../x", {})])


def test_genevals_results_have_its_own_summary(tmp_path):
    """Two tasks of different sizes: the overall score is the mean over tasks, not over images."""
    correct = {"counting": [[True, False], [False, False]], "colors": [[True, True]]}
    lines = [
        {"tag": tag, "prompt": "p", "correct": is_correct, "metadata": f"{tag}{number}", "filename": "f"}
        for tag, prompts in correct.items()
        for number, images in enumerate(prompts)
        for is_correct in images
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, scores = read_scores(tmp_path / "results.jsonl")
    assert name == "geneval"
    assert scores == pytest.approx(
        {"overall": 0.625, "correct_images": 0.5, "correct_prompts": 2 / 3, "counting": 0.25, "colors": 1.0,
         "images": 6, "prompts": 3}
    )  # fmt: skip


def test_a_line_of_results_ends_where_json_says(tmp_path):
    line = {"tag": "a", "metadata": "one\u2028prompt\x85", "correct": True}
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(line, ensure_ascii=False)}\r\n", encoding="utf-8", newline="")
    assert read_scores(tmp_path / "r.jsonl")[1]["prompts"] == 1


def test_names_from_results_can_be_shown(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"tag": "\\ud800\\u001b[31m", "metadata": "m", "correct": true}')
    assert r"\ud800\x1b[31m" in read_scores(tmp_path / "r.jsonl")[1]


DPG = """/images/1.png, 0.5, 0.75, 1.0, 0.75, 0.75
Model: images
L1 category scores:
	entity: 81.25
	relation: 70.0
L2 category scores:
	entity - whole: 80.5
	relation - spatial: 70.0
	other - text: nan
Image path: /images: 5
Save results to: /images/results.txt
DPG-Bench score: 75.125
"""


def test_dpgs_results(tmp_path):
    (tmp_path / "results.txt").write_text(DPG)
    name, scores = read_scores(tmp_path / "results.txt")
    assert name == "dpg_bench"
    assert scores == {
        "overall": 75.125, "entity": 81.25, "relation": 70.0, "entity - whole": 80.5, "relation - spatial": 70.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("r.jsonl", "", "is not GenEval's results: it has no images"),
        ("r.jsonl", '{"tag": "a", "metadata": "m"}', "correct is missing"),
        ("r.jsonl", '{"tag": "a", "metadata": "m", "correct": 7}', "correct is 7, not true or false"),
        ("r.jsonl", "[", "is not GenEval's results"),
        (
            "r.jsonl",
            '{"tag": "overall", "metadata": "m", "correct": true}',
            "has the name overall, which is that of",
        ),
        ("r.txt", "Model: x\n\toverall: 1\nDPG-Bench score: 2\n", "has the name overall"),
        ("r.txt", f"Model: x\n{' ' * 30_000}x\nDPG-Bench score: x\n", "could not convert"),  # in no time
        ("r.txt", "hello", "is neither GenEval's results.jsonl nor DPG-Bench's"),
        ("r.txt", "Model: x\nDPG-Bench score: nan\n", "has no DPG-Bench score that is a number"),
    ],
)
def test_what_are_no_results_is_told(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        read_scores(tmp_path / name)
