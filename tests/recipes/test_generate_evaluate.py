"""The jobs generate and evaluate as a user runs them, on one and on two processes."""

import contextlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import Output, UserError
from grpo.evaluation import make_writable, save_image
from grpo.jobs import convert, evaluate, generate, memory
from grpo.models import GPT, MODEL_SPECS, VQModel, get_tokenizer_spec, save_weights
from grpo.models.classifier import Classifier, ClassifierConfig

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights: a GPT of 16-pixel images (16 codes), a tokenizer, a classifier."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    gpt = GPT(MODEL_SPECS["GPT-tiny"].config(image_size=16, downsample_size=4, vocab_size=32, num_classes=NUM_CLASSES))
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    save_weights(folder / "gpt.safetensors", gpt.state_dict())
    vq = VQModel(get_tokenizer_spec("VQ-tiny").config(codebook_size=32, codebook_embed_dim=8))
    save_weights(folder / "vq.safetensors", vq.state_dict())
    classifier = Classifier(ClassifierConfig(width=8, num_classes=NUM_CLASSES))
    save_weights(folder / "classifier.safetensors", classifier.state_dict())
    return folder


def run_here(job, *flags, folder):
    """Runs a job in this process, on one thread of a CPU as the processes of torchrun below do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(folder), mock.patch("torch.cuda.is_available", return_value=False):
            job.main([str(flag) for flag in flags])
    finally:
        torch.set_num_threads(threads)


def run_on_two_processes(name, *flags, folder):
    """Runs a job as a user does, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "recipes" / f"{name}.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


GENERATOR = (
    *("--model.name", "GPT-tiny", "--model.checkpoint", "gpt.safetensors", "--model.num_classes", NUM_CLASSES),
    *("--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", "vq.safetensors", "--tokenizer.codebook_size", 32),
    *("--tokenizer.downsample_size", 4, "--sampling.image_size", 16, "--sampling.cfg_scale", 1.5),
    *("--sampling.mixed_precision", "fp32", "--sampling.seed", 7),
)


@pytest.fixture(scope="module")
def drawn(folder):
    """14 images, drawn by one process in batches of 4."""
    run_here(
        generate,
        *GENERATOR,
        *("--sampling.batch_size", 4, "--output.num_images", 14, "--output.npz", "one.npz"),
        *("--output.folder", "pngs", "--output.grid", "grid.png", "--output.grid_columns", 5),
        folder=folder,
    )
    with np.load(folder / "one.npz") as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_generated_files_hold_the_same_images(folder, drawn):
    images, class_ids = drawn
    assert images.shape == (14, 16, 16, 3)
    assert class_ids.tolist() == [i % NUM_CLASSES for i in range(14)]
    files = sorted((folder / "pngs").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(14)]
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(files, images, strict=True))
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert grid.shape == (3 * 18 - 2, 5 * 18 - 2, 4)  # no ground between the images
    assert np.array_equal(grid[18:34, 36:52, :3], images[7])  # second row, third column
    assert len(np.unique(images.reshape(14, -1), axis=0)) == 14


def test_images_depend_neither_on_the_batch_nor_on_the_processes(folder, drawn):
    flags = ("--sampling.batch_size", 3, "--output.num_images", 14, "--output.npz", "two.npz")
    run_on_two_processes("generate", *GENERATOR, *flags, folder=folder)
    with np.load(folder / "two.npz") as arrays:
        # Another batch size rounds the last bit of a product differently: one grey level, never another code.
        assert np.abs(arrays["arr_0"].astype(int) - drawn[0]).max() <= 1
        assert np.array_equal(arrays["arr_1"], drawn[1])


EVALUATION = ("--evaluation.feature_checkpoint", "classifier.safetensors", "--evaluation.batch_size", 4)
DATA = ("--data.name", "synthetic", "--data.image_size", 16, "--evaluation.num_reference_images", 20)


@pytest.fixture(scope="module")
def evaluated(folder, drawn):
    """What `evaluate` writes about those 14 images, read from the npz by one process."""
    flags = ("--model.num_classes", NUM_CLASSES, "--evaluation.reward_checkpoint", "classifier.safetensors")
    flags += ("--evaluation.images", "one.npz", "--evaluation.json_path", "npz.json")
    run_here(evaluate, *EVALUATION, *DATA, *flags, folder=folder)
    return json.loads((folder / "npz.json").read_text())


def test_a_result_names_what_it_depends_on(evaluated):
    metrics = evaluated["metrics"]["classifier"]
    assert set(metrics) == {
        *("fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"),
        *("accuracy", "reward_mean", "reward_std"),
    }
    assert metrics["fid"] > 0
    assert evaluated["images"]["source"]["path"] == "one.npz"
    assert len(evaluated["images"]["source"]["sha256"]) == 64
    assert evaluated["images"]["class_counts"] == [5, 5, 4]
    assert evaluated["reference"]["source"] == {"name": "synthetic", "path": None, "split": "train"}
    assert evaluated["reference"]["count"] == 20
    assert set(evaluated["judges"]) == {"classifier", "reward"}
    assert evaluated["settings"]["nearest_k"] == 3
    assert evaluated["versions"]["torch"] == version("torch")
    assert "cpu" in evaluated["hardware"]


def test_a_checkpoint_on_two_processes_scores_as_its_npz_on_one(folder, evaluated):
    flags = ("--evaluation.num_images", 14, "--evaluation.reward_checkpoint", "classifier.safetensors")
    flags += ("--sampling.batch_size", 4, "--evaluation.json_path", "drawn.json")
    run_on_two_processes("evaluate", *GENERATOR, *EVALUATION, *DATA, *flags, folder=folder)
    result = json.loads((folder / "drawn.json").read_text())
    assert result["metrics"] == evaluated["metrics"]
    assert result["processes"] == 2
    assert result["images"]["source"]["model"]["spec"] == "GPT-tiny"
    assert result["images"]["sampler"]["cfg_scale"] == 1.5
    assert result["images"]["sampler"]["mixed_precision"] == "fp32"
    assert result["images"]["resize"] == "none"


def test_a_protocol_names_what_departs_from_it(folder, drawn, monkeypatch):
    """By a small judge with spatial features, of images of random classes."""

    def judge(pixels):
        flat = pixels.float().flatten(1)
        return flat[:, :5], flat[:, 5:8], flat[:, 8:12]

    judge.names_classes, judge.is_inception = False, True
    monkeypatch.setattr(evaluate, "load_judges", lambda config, *, device: {"inception": judge})
    flags = ("--evaluation.protocol", "llamagen", "--evaluation.inception_checkpoint", "classifier.safetensors")
    flags += ("--evaluation.reference", "one.npz", "--evaluation.num_images", 9, "--evaluation.json_path", "adm.json")
    run_here(evaluate, *GENERATOR, *flags, "--sampling.resize_to", 16, folder=folder)
    result = json.loads((folder / "adm.json").read_text())
    assert {"fid", "sfid", "precision", "recall", "inception_score"} <= set(result["metrics"]["inception"])
    assert result["images"]["class_counts"] != [3, 3, 3]
    assert result["settings"]["protocol"] == result["protocol"]["name"] == "llamagen"
    assert result["protocol"]["departures"] == [
        "evaluation.num_images = 9, not 50000",
        "sampling.resize_to = 16, not 256",
        "evaluation.reference has no mu, sigma, mu_s and sigma_s of a whole data set",
    ]


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        (generate, (*GENERATOR, "--output.folder", "pngs"), "output.folder pngs is not empty"),
        (generate, (*GENERATOR, "--output.grid", "grid.gif"), "output.grid grid.gif must end in .png"),
        (generate, (*GENERATOR, "--output.folder", "gpt.safetensors"), "output.folder gpt.safetensors cannot be"),
        (generate, (*GENERATOR, "--output.npz", "gpt.safetensors/a.npz"), "output.npz gpt.safetensors/a.npz cannot be"),
        (
            evaluate,
            (*EVALUATION, *DATA, "--evaluation.images", "pngs", "--evaluation.json_path", "pngs"),
            "evaluation.json_path pngs is a folder",
        ),
        (evaluate, (*EVALUATION, *DATA, "--evaluation.images", "no.npz"), "no.npz does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, drawn, job, flags, message):
    with pytest.raises(UserError) as caught:
        run_here(job, *flags, folder=folder)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("length", [300, 250])  # the second is too long only for the unfinished file's name
def test_names_that_are_too_long_are_told(length, tmp_path):
    name = "x" * length
    with pytest.raises(UserError, match="File name too long"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / f"{name}.png"[-length:])
    if length == 250:
        return
    for key, is_folder in {"output.grid": False, "output.folder": True, "evaluation.json_path": False}.items():
        with pytest.raises(UserError, match=f"{key} .*File name too long"):
            make_writable(tmp_path / name, key=key, folder=is_folder)
    save_weights(tmp_path / "a.pt", {"a": torch.ones(1)})
    with pytest.raises(UserError, match=r"convert\.output .*File name too long"):
        convert.main(["--convert.input", str(tmp_path / "a.pt"), "--convert.output", str(tmp_path / f"{name}.pt")])
    with pytest.raises(UserError, match=r"output\.folder .*File name too long"):
        generate.prepare(Output(folder=str(tmp_path / name)))


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"output\.grid .* is a device or a pipe"):
        make_writable(tmp_path / "pipe", key="output.grid")


@pytest.mark.parametrize("amount", ["nan", "inf", "1e300", "-1", "0"])
def test_an_absurd_memory_is_refused(amount):
    with pytest.raises(UserError, match=r"--memory .* must be the GiB of one GPU"):
        memory.main(["--config", "debug", f"--memory={amount}"])
