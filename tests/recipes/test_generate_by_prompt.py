"""The jobs generate and evaluate by prompt."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import UserError
from grpo.jobs import evaluate, generate
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, VQModel, save_weights
from grpo.models.classifier import Classifier, ClassifierConfig
from tests.texts.tiny_t5 import WIDTH, save_tiny_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights: a GPT of 16-pixel images asked by texts, a tokenizer, a classifier; and two prompts."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "downsample_size": 4, "vocab_size": 32, "cls_token_num": 6, "caption_dim": WIDTH}
    gpt = GPT(MODEL_SPECS["GPT-tiny"].config(**sizes))
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    for layer in gpt.layers:  # so that what is asked for shows
        torch.nn.init.normal_(layer.attention.wqkv.weight, std=0.3)
    torch.nn.init.normal_(gpt.cls_embedding.cap_proj.fc2.weight, std=2.0)
    save_weights(folder / "gpt.safetensors", gpt.state_dict(), config=gpt.config)
    vq = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32))
    save_weights(folder / "vq.pt", vq.state_dict())
    judge = Classifier(ClassifierConfig(width=8, num_classes=3))
    save_weights(folder / "judge.safetensors", judge.state_dict(), config=judge.config)
    (folder / "prompts.txt").write_text("a red circle\ntwo large blue squares\n")
    return folder


@pytest.fixture
def flags(folder):
    found = [
        "--model.name", "GPT-tiny", "--model.checkpoint", folder / "gpt.safetensors", "--model.cls_token_num", 6,
        "--model.caption_dim", WIDTH, "--text.encoder", "words", "--tokenizer.name", "VQ-tiny",
        "--tokenizer.checkpoint", folder / "vq.pt", "--tokenizer.codebook_size", 32, "--tokenizer.downsample_size", 4,
        "--sampling.image_size", 16, "--sampling.mixed_precision", "fp32",
    ]  # fmt: skip
    return [str(flag) for flag in found]


def run(job, *flags):
    job.main([str(flag) for flag in flags])


def test_prompts_in_turn_and_one_alone(flags, folder, tmp_path):
    """An image is a function of prompt, number and seed: the second of two prompts is also image 1 of it alone."""
    prompts = ["--sampling.prompts", folder / "prompts.txt"]
    run(generate, *flags, *prompts, "--output.npz", tmp_path / "a.npz", "--output.num_images", 5, "--output.grid",
        tmp_path / "a.png", "--output.grid_columns", 3, "--output.folder", tmp_path / "a")  # fmt: skip
    with np.load(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["arr_0"]  # no classes
        images = arrays["arr_0"]
    assert images.shape == (5, 16, 16, 3)
    alone = [*prompts, "--sampling.prompt", "Two  large BLUE squares", "--output.num_images", 5]
    run(generate, *flags, *alone, "--output.npz", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as arrays:
        others = arrays["arr_0"]
    equal = [bool((one == other).all()) for one, other in zip(images, others, strict=True)]
    assert equal == [False, True, False, True, False]
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size[0] > 3 * 160  # large enough for the words below
    assert sorted(os.listdir(tmp_path / "a")) == [f"{number:06d}.png" for number in range(5)]


def test_geneval_and_dpg(flags, tmp_path):
    entries = [{"tag": "single_object", "include": [], "prompt": prompt} for prompt in ("a dog", "two cats", "a dog")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    asked = ["--sampling.prompts", tmp_path / "evaluation_metadata.jsonl", "--output.images_per_prompt", 2]
    run(generate, *flags, *asked, "--output.layout", "geneval", "--output.folder", tmp_path / "geneval")
    found = sorted(str(path.relative_to(tmp_path / "geneval")) for path in (tmp_path / "geneval").rglob("*.png"))
    assert found == [f"{prompt:05d}/samples/{number:04d}.png" for prompt in range(3) for number in range(2)]
    one, again = ((tmp_path / "geneval" / place / "samples" / "0000.png").read_bytes() for place in ("00000", "00002"))
    assert one != again  # the same prompt, another image
    (tmp_path / "prompts").mkdir()
    for name in ("7", "12"):
        (tmp_path / "prompts" / f"{name}.txt").write_text("a dog\n")
    asked = ["--sampling.prompts", tmp_path / "prompts", "--sampling.batch_size", 4]
    run(generate, *flags, *asked, "--output.layout", "dpg", "--output.folder", tmp_path / "dpg")
    for name in ("7", "12"):
        with Image.open(tmp_path / "dpg" / f"{name}.png") as image:
            assert image.size == (32, 32)


def test_evaluation_by_prompt_and_published_scores(flags, folder, tmp_path):
    np.savez(tmp_path / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8))
    asked = ["--sampling.prompts", folder / "prompts.txt", "--evaluation.num_images", 9]
    asked += ["--evaluation.reference", tmp_path / "reference.npz", "--evaluation.json_path", tmp_path / "result.json"]
    run(evaluate, *flags, *asked, "--evaluation.feature_checkpoint", folder / "judge.safetensors")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["classifier"]["fid"] > 0
    assert "accuracy" not in result["metrics"]["classifier"]
    assert result["images"]["prompts"]["sha256"]
    assert result["images"]["text"]["encoder"] == "words"
    (tmp_path / "results.jsonl").write_text('{"tag": "colors", "metadata": "m", "correct": true}\n')
    scores = ["--evaluation.scores", tmp_path / "results.jsonl", "--evaluation.json_path", tmp_path / "result.json"]
    run(evaluate, *scores)
    together = json.loads((tmp_path / "result.json").read_text())
    assert together["metrics"]["geneval"]["overall"] == 1.0
    assert together["metrics"]["classifier"] == result["metrics"]["classifier"]
    assert together["scores"]["geneval"]["sha256"]
    run(evaluate, *scores[:2], "--evaluation.json_path", tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["metrics"]["geneval"]["colors"] == 1.0
    for wrong in ('{"scores": "mine"}', '{"metrics": [1]}', "[]"):
        (tmp_path / "new.json").write_text(wrong)
        with pytest.raises(UserError, match=r"new.json is no file of results: .*; give another path"):
            run(evaluate, *scores[:2], "--evaluation.json_path", tmp_path / "new.json")


def test_prompts_through_a_t5(flags, tmp_path):
    """Features on disk where they are there, else by the encoder; both give the same images."""
    pytest.importorskip("transformers", reason="the extra [text] is not installed")
    from grpo.jobs import encode_text

    t5 = save_tiny_t5(tmp_path / "t5")
    (tmp_path / "prompts.txt").write_text("a red circle\na dog\n")
    run(encode_text, "--data.name", "prompts", "--data.path", tmp_path / "prompts.txt", "--text.path", t5,
        "--encode_text.output", tmp_path / "f", "--encode_text.precision", "fp32")  # fmt: skip
    place = flags.index("words")
    t5_flags = [*flags[: place - 1], *flags[place + 1 :], "--sampling.prompts", tmp_path / "prompts.txt"]
    t5_flags += ["--output.num_images", 2, "--output.npz"]
    live, stored = (["--text.path", t5], ["--text.features", tmp_path / "f"])
    for number, encoder in enumerate((live, stored, live + stored)):
        run(generate, *t5_flags, tmp_path / f"{number}.npz", *encoder)
    images = [np.load(tmp_path / f"{number}.npz")["arr_0"] for number in range(3)]
    assert (images[0] == images[1]).all()
    assert (images[0] == images[2]).all()
    (tmp_path / "prompts.txt").write_text("a large dog\na dog\n")
    run(generate, *t5_flags, tmp_path / "3.npz", *live, *stored)
    with pytest.raises(UserError, match="has no features of 'a large dog': add them with `grpo encode-text`"):
        run(generate, *t5_flags, tmp_path / "4.npz", *stored)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], "sampling.prompts or sampling.prompt is required"),
        (["--sampling.prompts", "nowhere.txt"], "nowhere.txt does not exist; wanted: prompts"),
        (["--sampling.prompt", " "], "sampling.prompt: the text is empty"),
        (["--sampling.prompt", "!"], "finds no word in '!': change the text"),
        (["--sampling.prompt", "a", "--output.layout", "dpg"], r"output.folder is required with output.layout = .dpg"),
        (["--sampling.prompt", "a", "--text.encoder", "t5"], "text.path or text.features is required"),
    ],
)
def test_mistakes(flags, tmp_path, changes, told):
    at = flags.index("--text.encoder")
    flags = [*flags[:at], *flags[at + 2 :]] if "t5" in changes else flags
    with pytest.raises(UserError, match=told), contextlib.chdir(tmp_path):
        run(generate, *flags, "--output.grid", "a.png", "--output.num_images", 2, *changes)
