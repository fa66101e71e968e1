"""recipes/pretrain.py on digits."""

import math

import pytest
import torch

from grpo.models import TOKENIZER_SPECS, VQModel, load_gpt, read_weights, save_weights

NAMES = ("loss", "entropy", "grad_norm", "lr")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "vq.safetensors"
    model = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32))
    save_weights(path, model.state_dict(), config=model.config)
    return path


@pytest.fixture
def tiny(tokenizer):
    return [
        "--model.name", "GPT-tiny", "--model.num_classes", 10,
        "--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", tokenizer,
        "--tokenizer.codebook_size", 32, "--tokenizer.downsample_size", 4,
        "--data.name", "digits", "--data.image_size", 32, "--data.num_workers", 0,
        "--optimizer.lr", 1e-2, "--training.mixed_precision", "fp32",
    ]  # fmt: skip


def plain(lines):
    return [[line[name] for name in NAMES] for line in lines]


def close(lines):
    return [pytest.approx(line, rel=1e-4) for line in plain(lines)]


def test_loss_falls_from_that_of_chance(run_here, tiny, tmp_path):
    flags = ["--training.steps", 20, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "run"]
    lines = run_here("pretrain", *tiny, *flags)
    assert lines[0]["loss"] == pytest.approx(math.log(32), rel=1e-5)
    assert lines[0]["entropy"] == pytest.approx(math.log(32), rel=1e-5)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    weights = read_weights(tmp_path / "run" / "model.safetensors")
    assert weights["tok_embeddings.weight"].shape == (32, 64)
    load_gpt(tmp_path / "run" / "model.safetensors")


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run_here, tiny, tmp_path):
    """With both dropouts, whose random numbers must go on where they stopped, and a moving average of the weights."""
    flags = [*tiny, "--training.batch_size", 4, "--model.class_dropout", 0.5, "--data.cache_codes", "true"]
    flags += ["--model.dropout", 0.2, "--training.ema_decay", 0.9]
    whole = run_here("pretrain", *flags, "--training.steps", 4, "--metrics.run_dir", tmp_path / "whole")
    broken = [*flags, "--metrics.run_dir", tmp_path / "broken"]
    run_here("pretrain", *broken, "--training.steps", 2)
    resumed = run_here("pretrain", *broken, "--training.steps", 4)
    assert plain(resumed) == plain(whole)
    weights = {
        file: [(tmp_path / name / file).read_bytes() for name in ("whole", "broken")]
        for file in ("model.safetensors", "model_ema.safetensors")
    }
    assert all(whole == broken for whole, broken in weights.values())
    assert weights["model.safetensors"] != weights["model_ema.safetensors"]
    load_gpt(tmp_path / "broken" / "model_ema.safetensors")


def test_two_processes_accumulation_and_the_cache_of_codes_change_nothing(run_here, run_on_two, tiny, tmp_path):
    """With both dropouts, whose masks are those of the images."""
    flags = [*tiny, "--training.steps", 3, "--checkpoint.save_final", "false"]
    flags += ["--model.dropout", 0.2, "--model.class_dropout", 0.5]
    one = run_here("pretrain", *flags, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "one")
    parts = ["--training.batch_size", 8, "--training.micro_batch_size", 2, "--data.cache_codes", "true"]
    two = run_on_two("pretrain", *flags, *parts, "--metrics.run_dir", tmp_path / "two")
    assert plain(two) == close(one)


def test_class_dropout_trains_the_unconditional_slot(run_here, tiny, tmp_path):
    flags = [*tiny, "--training.batch_size", 4, "--optimizer.weight_decay", 0, "--model.class_dropout", 1.0]
    tables = []
    for steps in (1, 3):
        run_dir = tmp_path / f"{steps}"
        run_here("pretrain", *flags, "--training.steps", steps, "--metrics.run_dir", run_dir)
        tables.append(read_weights(run_dir / "model.safetensors")["cls_embedding.embedding_table.weight"])
    changed = (tables[0] != tables[1]).any(dim=1)  # from the second step on: the output projection starts at zero
    assert changed.tolist() == [False] * 10 + [True]


def test_run_on_a_stream_goes_on_exactly(run_here, tiny, tmp_path):
    """In the middle of a window of the third file."""
    import datasets
    from PIL import Image

    (tmp_path / "data").mkdir()
    for file in range(4):
        colors = [(60 * file, 20 * row, 0) for row in range(6)]
        rows = {"image": [Image.new("RGB", (32, 32), color) for color in colors], "label": [0, 1, 2, 3, 4, 5]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{file}.parquet")
    at = tiny.index("digits")
    flags = [*tiny[:at], "stream", "--data.path", tmp_path / "data", "--data.shuffle_window", 5, *tiny[at + 1 :]]
    flags += ["--training.batch_size", 4]
    whole = run_here("pretrain", *flags, "--training.steps", 8, "--metrics.run_dir", tmp_path / "whole")
    run_here("pretrain", *flags, "--training.steps", 4, "--metrics.run_dir", tmp_path / "broken")
    resumed = run_here("pretrain", *flags, "--training.steps", 8, "--metrics.run_dir", tmp_path / "broken")
    assert plain(resumed) == plain(whole)
