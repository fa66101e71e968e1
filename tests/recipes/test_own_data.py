"""The commands of docs/own_data.md, one after the other, on small weights."""

import json
import re
import shlex
from contextlib import chdir
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from grpo.__main__ import JOBS
from grpo.config import UserError
from grpo.formats import read_config
from grpo.models import (
    MODEL_SPECS,
    imagenet_names,
    load_gpt,
    read_weights,
)

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["circle", "cross", "square", "star"]
TABLE = "cls_embedding.embedding_table.weight"
SIZES = partial(MODEL_SPECS["GPT-tiny"].config, image_size=32, downsample_size=4, vocab_size=32)
PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SMALL = {job: flags.split() for job, flags in re.findall(r"^\| `grpo (\w+)` \| `(.+)` \|$", PAGE, re.MULTILINE)}
"""Job -> the page's flags for weights that are small."""
SMALL["tokenizer"] = [*SMALL["classifier"][:4], "--tokenizer.name", "VQ-tiny", "--tokenizer.codebook_size", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the page asks for: LlamaGen's two files, small, and drawings in four classes."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    (stand_ins,) = (text for language, text in BLOCKS if language == "python")
    with chdir(folder):
        exec(compile(stand_ins, "docs/own_data.md", "exec"), {})
    shapes = {
        "circle": lambda draw: draw.ellipse((4, 4, 28, 28), fill="white"),
        "cross": lambda draw: draw.line((4, 4, 28, 28), fill="white", width=4),
        "square": lambda draw: draw.rectangle((6, 6, 26, 26), fill="white"),
        "star": lambda draw: draw.regular_polygon((16, 16, 12), 3, fill="white"),
    }
    for split in ("train", "validation"):
        for name, paint in shapes.items():
            (folder / "my_images" / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (32, 32), (40 * number, 0, 60))
                paint(ImageDraw.Draw(image))
                image.save(folder / "my_images" / split / name / f"{number}.png")
    return folder


def commands() -> list[str]:
    return [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("grpo ")]


def run(command: str, *more: str) -> None:
    """What the shell would do, in this process, with weights that are small."""
    _, job, *arguments = shlex.split(command)
    given = {word for word in arguments if word.startswith("--")}
    small = SMALL.get(job, [])
    small = zip(small[::2], small[1::2], strict=True)
    flags = [word for flag, value in small if flag not in given for word in (flag, value)]
    import_module(f"grpo.jobs.{JOBS[job]}").main([*arguments, *flags, *more])


def test_every_command_of_the_page(place, monkeypatch):
    monkeypatch.chdir(place)
    listed = commands()
    assert [shlex.split(line)[1] for line in listed] == [
        *["pretrain", "classifier", "classifier", "train", "train", "generate", "generate", "evaluate"],
        *["convert", "convert", "tokenizer", "pretrain", "classifier", "train", "generate"],
    ]
    for command in listed:
        few = ["--training.micro_batch_size", "8"] if "quickstart/" in command else []
        run(command.replace("step-000100", "step-000002"), *few)

    before = read_weights("pretrained/c2i_B_256.pt")[TABLE]
    tuned = load_gpt("runs/pretrain/model.safetensors")
    assert tuned.config.num_classes == 4
    assert tuned.config.class_names == tuple(CLASSES)
    assert tuned.cls_embedding.embedding_table.weight.shape == (5, 64)
    table = tuned.cls_embedding.embedding_table.weight
    torch.testing.assert_close(table, before[-1:].expand(5, -1), atol=0.01, rtol=0)
    assert not torch.equal(table[0], before[-1])
    for name in ("runs/grpo/model.safetensors", "own.safetensors"):
        assert read_config(name)["class_names"] == CLASSES
    assert load_gpt("own.pt", tuned.config).config.num_classes == 4
    lines = [json.loads(line) for line in Path("runs/grpo_classes/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["reward_mean"] for line in lines]).all()
    assert "aux_ce" not in lines[0]
    assert {"accuracy", "fid"} <= json.loads(Path("result.json").read_text())["metrics"]["classifier"].keys()
    assert Path("before.png").is_file()
    assert Path("after.png").is_file()
    assert read_config("runs/own/grpo/model.safetensors")["class_names"] == CLASSES
    assert Path("runs/own/grpo/grid.png").is_file()


TUNE = "grpo pretrain --config own_classes/pretrain --checkpoint.interval 0 --optimizer.weight_decay 0"


def test_new_classes_beside_imagenets_embeddings_alone(place, monkeypatch, tmp_path):
    """1,000 classes keep their rows, four come after them, and the unconditional one moves to the end."""
    monkeypatch.chdir(place)
    flags = ["--model.num_classes", "1004", "--model.class_dropout", "0", "--model.trained", "embeddings"]
    flags += ["--optimizer.lr", "0.01", "--optimizer.schedule", "constant"]
    run(f"{TUNE} --metrics.run_dir {tmp_path}/whole", *flags)
    run(f"{TUNE} --metrics.run_dir {tmp_path}/broken --training.steps 1", *flags)
    run(f"{TUNE} --metrics.run_dir {tmp_path}/broken", *flags)
    whole, broken = (tmp_path / name / "model.safetensors" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    before, after = read_weights("pretrained/c2i_B_256.pt"), read_weights(whole)
    assert read_config(whole)["class_names"] == [*imagenet_names(), *CLASSES]
    assert torch.equal(after[TABLE][:1000], before[TABLE][:1000])
    assert torch.equal(after[TABLE][1004], before[TABLE][1000])
    assert (after[TABLE][1000:1004] != before[TABLE][1000]).any(dim=1).all()
    assert all(torch.equal(after[name], before[name]) for name in before if name != TABLE)


def test_new_classes_that_do_not_add_up(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"the weights have 1000 classes; .* must be 4 .* or 1004"):
        load_gpt("pretrained/c2i_B_256.pt", SIZES(num_classes=1000), new_classes=4)
    with pytest.raises(UserError, match=r"'circle', 'cross', 'square', 'star' are no classes of the model"):
        run(TUNE, "--model.num_classes", "1000", "--model.new_classes", "0")
    with pytest.raises(UserError, match=r"images of 4 new classes, and model\.new_classes = 5"):
        run(TUNE, "--model.num_classes", "5", "--model.new_classes", "5", "--metrics.run_dir", "runs/untrained")
    copytree("my_images/train", tmp_path / "images")
    (tmp_path / "images/circle").rename(tmp_path / "images/zirkel")
    with pytest.raises(UserError, match=r"'zirkel' is no class of the model.* let `grpo pretrain` add them"):
        run(f"grpo train --config own_classes/grpo --data.path {tmp_path}/images --metrics.run_dir runs/unknown")
    for file in (tmp_path / "images/zirkel").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"images of 3 new classes, none of 'zirkel'"):
        run(TUNE, "--data.path", str(tmp_path / "images"), "--metrics.run_dir", "runs/empty")
    with pytest.raises(UserError, match=r"the weights have num_classes 4, the recipe wants 5"):
        run("grpo train --config own_classes/grpo --metrics.run_dir runs/five", "--model.num_classes", "5")


@pytest.mark.parametrize("job", ["pretrain", "classifier"])
def test_a_class_that_comes_in_front_is_noticed_on_resumption(place, monkeypatch, tmp_path, job):
    monkeypatch.chdir(place)
    copytree("my_images", tmp_path / "images")
    flags = ["--data.path", str(tmp_path / "images"), "--metrics.run_dir", str(tmp_path / "run")]
    command = f"grpo {job} --config own_classes/{job}"
    run(command, *flags)
    (tmp_path / "images/train/star").rename(tmp_path / "images/train/asterisk")
    with pytest.raises(UserError, match="data: files, labels since the checkpoint was written"):
        run(command, *flags)
    named = ["--checkpoint.resume", str(tmp_path / "run/checkpoints/step-000002")]  # accepts other data, not other ids
    with pytest.raises(UserError, match="class 0 was 'circle' when it was written and is 'asterisk' in the data now"):
        run(command, *flags, *named)


def test_a_classifier_of_other_classes_does_not_reward(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    copytree("my_images", tmp_path / "images")
    (tmp_path / "images/train/star").rename(tmp_path / "images/train/asterisk")
    flags = ["--data.path", str(tmp_path / "images"), "--metrics.run_dir", str(tmp_path / "run")]
    run("grpo classifier --config own_classes/classifier", *flags)
    reward = ["--reward.class_log_prob.checkpoint", str(tmp_path / "run/model.safetensors")]
    with pytest.raises(UserError, match=r"class 0 of .* is 'asterisk', that of the model 'circle'"):
        run("grpo train --config own_classes/grpo --metrics.run_dir runs/wrong", *reward)
