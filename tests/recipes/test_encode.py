"""recipes/encode.py, and runs on the codes that it writes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from grpo.config import EncodeRecipe, UserError, load_recipe
from grpo.data import CodeFolder, build_dataset
from grpo.jobs.encode import encode
from grpo.models import TOKENIZER_SPECS, VQModel, load_vq, save_weights
from grpo.parallel import distributed

COMMAND = [sys.executable, "-m", "grpo", "encode"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "vq.safetensors"
    model = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32))
    save_weights(path, model.state_dict(), config=model.config)
    return path


@pytest.fixture
def digits(tokenizer):
    flags = [
        "--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", tokenizer,
        "--tokenizer.codebook_size", 32, "--tokenizer.downsample_size", 4,
        "--data.name", "digits", "--data.split", "test", "--data.image_size", 32,
    ]  # fmt: skip
    return [str(flag) for flag in flags]


@pytest.fixture
def encode_here():
    def run(*flags):
        recipe = load_recipe(EncodeRecipe, [str(flag) for flag in flags])
        with distributed(60) as world:
            encode(recipe, world)
        return CodeFolder(recipe.encode.output)

    return run


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_codes_are_the_tokenizers(encode_here, digits, tokenizer, tmp_path):
    digits = [*digits, "--data.num_workers", 0]
    folder = encode_here(*digits, "--encode.output", tmp_path / "codes", "--encode.augmentation", "flip")
    recipe = load_recipe(EncodeRecipe, [*map(str, digits), "--encode.output", "x"])
    dataset, model = build_dataset(recipe.data, num_classes=10), load_vq(tokenizer)
    images = torch.stack([dataset[index][0] for index in range(12)])
    with torch.no_grad():
        expected = torch.stack([model.encode(images), model.encode(images.flip(-1))], dim=1)
    found = np.stack([[folder.row(index, variant) for variant in range(2)] for index in range(12)])
    assert (found == expected.numpy()).mean() > 0.999  # a batch of another size may round otherwise
    assert len(expected.unique()) > 5
    assert folder.labels.tolist() == dataset.class_ids.tolist()


def test_two_processes_and_a_kill_write_the_same_files(encode_here, digits, tmp_path):
    """The folder is that of an uninterrupted job, byte by byte."""
    flags = [*digits, "--encode.augmentation", "flip", "--encode.shard_size", "40", "--data.num_workers", "1"]
    encode_here(*flags, "--encode.output", tmp_path / "whole")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    broken = tmp_path / "broken"
    job = subprocess.Popen([*COMMAND, *flags, "--encode.output", broken], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(broken.glob("codes-*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert 0 < len(list(broken.glob("codes-*.npy"))) < 13
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "grpo"]
    subprocess.run(
        [*launcher, "encode", *flags, "--encode.output", broken], env=environment, check=True, capture_output=True
    )
    assert files(broken) == files(tmp_path / "whole")


def test_runs_on_codes_equal_runs_that_encode(encode_here, run_here, digits, tmp_path):
    codes, digits = tmp_path / "codes", [*digits, "--data.num_workers", 0]
    encode_here(*digits, "--encode.output", codes)
    model = ["--model.name", "GPT-tiny", "--model.num_classes", 10, "--training.mixed_precision", "fp32"]
    model += ["--training.steps", 3, "--checkpoint.save_final", "false"]
    pretrain = [*model, "--training.batch_size", 8, "--optimizer.lr", 1e-2]
    grpo = [*model, "--rollout.batch_size", 4, "--rollout.num_generations", 2, "--rollout.mode", "teacher_forced"]

    def losses(job, name, *flags):
        return [line["loss"] for line in run_here(job, *flags, "--metrics.run_dir", tmp_path / name)]

    expected = losses("pretrain", "encoded", *digits, *pretrain)
    assert losses("pretrain", "codes", *digits, *pretrain, "--data.codes", codes) == pytest.approx(expected, rel=1e-3)
    at = digits.index("digits")
    alone = [*digits[:at], "codes", "--data.path", codes, *digits[at + 3 :]]
    assert losses("pretrain", "alone", *alone, *pretrain) == pytest.approx(expected, rel=1e-3)
    compared = [*grpo, "--reward.reconstruction.weight", 1]
    expected = losses("train", "grpo", *digits, *compared)
    found = losses("train", "grpo-codes", *digits, *compared, "--data.codes", codes)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert len(losses("train", "no-images", *alone, *grpo, "--reward.jpeg_size.weight", 1)) == 3


def test_bad_images_are_told_and_counted(encode_here, tokenizer, tmp_path, capsys, caplog):
    from PIL import Image

    (tmp_path / "images" / "a").mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (20, 20), (50 * index, 0, 0)).save(tmp_path / "images" / "a" / f"{index}.png")
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no image")
    flags = [
        "--data.path", tmp_path / "images", "--data.image_size", 16, "--data.num_workers", 0, "--encode.shard_size", 2,
        "--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", tokenizer, "--tokenizer.codebook_size", 32,
        "--tokenizer.downsample_size", 4, "--encode.output", tmp_path / "codes",
    ]  # fmt: skip
    folder = encode_here(*flags)
    assert "1.png is not an image file that can be read; the next image takes its place" in caplog.text
    assert list(folder.about["unreadable"]) == ["1"]
    assert folder.row(2, 0).any()
    assert "5 images, 1 x 16 codes each" in capsys.readouterr().out
    encode_here(*flags)
    assert "3 of 3 shards are there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 unreadable images, more than data.max_bad_images = 0"):
        encode_here(*flags[:-1], tmp_path / "strict", "--data.max_bad_images", 0)
