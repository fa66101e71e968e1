"""recipes/encode_text.py: a tiny T5 over captions, one and two processes, killed and started again, and runs on it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from grpo.config import EncodeTextRecipe, UserError, load_recipe
from grpo.jobs.encode_text import encode_texts
from grpo.parallel import distributed
from grpo.texts import FeatureStore
from tests.texts.tiny_t5 import WIDTH, save_tiny_t5

pytest.importorskip("transformers", reason="the extra [text] is not installed")

TEXTS = [f"a {size} {color} {shape}" for size in ("small", "large", "two") for color in ("red", "blue")
         for shape in ("circle", "squares", "dog", "cat")]  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def flags(t5, tmp_path):
    """Of the job: 24 texts, of which two come again, in shards of three."""
    (tmp_path / "prompts.txt").write_text("\n".join([*TEXTS, *TEXTS[:2]]))
    found = ["--data.name", "prompts", "--data.path", tmp_path / "prompts.txt", "--text.path", t5]
    found += ["--encode_text.shard_size", 3, "--encode_text.batch_size", 2, "--encode_text.precision", "fp32"]
    return [str(flag) for flag in found]


def encode(*flags):
    recipe = load_recipe(EncodeTextRecipe, [str(flag) for flag in flags], needs_files=True)
    with distributed(60) as world:
        encode_texts(recipe, world)
    return FeatureStore(recipe.encode_text.output, rows=16, width=WIDTH)


def test_two_processes_and_a_kill_give_what_one_process_gives(flags, tmp_path, capsys):
    whole = encode(*flags, "--encode_text.output", tmp_path / "whole")
    assert len(whole) == len(TEXTS)
    assert "features of 24 texts, 24 wide" in capsys.readouterr().out
    broken = tmp_path / "broken"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "grpo", "encode-text", *flags, "--encode_text.output", str(broken)]
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(broken.glob("features-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert list(broken.glob("features-*"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launcher, *command[1:]], env=environment, check=True, capture_output=True)
    again = FeatureStore(broken, rows=16, width=WIDTH)
    assert again.missing(TEXTS) == []
    assert len(again) == len(TEXTS)
    for one, other in zip(whole.features(TEXTS), again.features(TEXTS), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_texts_are_added_and_known_ones_are_not_encoded_again(flags, tmp_path, capsys):
    encode(*flags, "--encode_text.output", tmp_path / "f")
    (tmp_path / "prompts.txt").write_text("a cat\n" + TEXTS[0])
    store = encode(*flags, "--encode_text.output", tmp_path / "f")
    assert "features of 1 of 2 texts are there already" in capsys.readouterr().out
    assert len(store) == len(TEXTS) + 1
    with pytest.raises(UserError, match="holds features of something else: encoder, max_tokens differ"):
        encode(*flags, "--encode_text.output", tmp_path / "f", "--encode_text.max_tokens", 9)


def test_a_run_on_features_from_disk(flags, run_here, tmp_path):
    encode(*flags, "--encode_text.output", tmp_path / "f")
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    for number, text in enumerate(TEXTS):
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(text)
    run = [
        "--model.name", "GPT-tiny", "--model.cls_token_num", 8, "--model.caption_dim", WIDTH,
        "--text.features", tmp_path / "f", "--tokenizer.name", "VQ-tiny", "--tokenizer.codebook_size", 64,
        "--tokenizer.downsample_size", 4, "--tokenizer.checkpoint", tokenizer(tmp_path), "--data.image_size", 16,
        "--data.path", tmp_path / "pictures", "--data.num_workers", 1, "--training.mixed_precision", "fp32",
        "--training.batch_size", 8, "--training.steps", 4, "--optimizer.lr", 1e-2, "--checkpoint.interval", 2,
    ]  # fmt: skip
    lines = run_here("pretrain", *run, "--metrics.run_dir", tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    (tmp_path / "pictures" / "3.txt").write_text("a photo of something else")
    with pytest.raises(UserError, match="has no features of 'a photo of something else'"):
        run_here("pretrain", *run, "--metrics.run_dir", tmp_path / "other")
    (tmp_path / "pictures" / "3.txt").write_text(TEXTS[4])
    with pytest.raises(UserError, match="text: captions since the checkpoint was written"):
        run_here("pretrain", *run, "--metrics.run_dir", tmp_path / "run")


def tokenizer(folder):
    from grpo.models import TOKENIZER_SPECS, VQModel, save_weights

    torch.manual_seed(0)
    save_weights(folder / "vq.pt", VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=64)).state_dict())
    return folder / "vq.pt"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--text.path", "nowhere"], "nowhere does not exist; wanted: a folder of transformers' T5"),
        (["--text.encoder", "words"], 'text.encoder = "words" needs no features on disk'),
        (["--data.name", "classes"], 'data.name = "classes" has no texts to encode'),
    ],
)
def test_mistakes(flags, tmp_path, changes, told):
    at = flags.index(changes[0]) if changes[0] in flags else len(flags)
    with pytest.raises(UserError, match=told):
        encode(*flags[:at], *changes, *flags[at + 2 :], "--encode_text.output", tmp_path / "f")
