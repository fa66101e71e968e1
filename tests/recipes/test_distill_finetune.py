"""recipes/distill.py and recipes/finetune.py, as quickstart and published recipes, in miniature."""

import math

import pytest
import torch

from grpo.config import UserError
from grpo.kernels import linear_kl
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, ClassCondition, VQModel, load_gpt, read_weights, save_weights
from grpo.rollout import generate
from grpo.rollout.scoring import hidden_states

SIZES = {"image_size": 24, "downsample_size": 4, "vocab_size": 64, "num_classes": 10}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of a small generator whose conditions matter."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    generator = GPT(MODEL_SPECS["GPT-tiny"].config(**SIZES))
    torch.nn.init.normal_(generator.output.weight, std=0.2)
    torch.nn.init.normal_(generator.cls_embedding.embedding_table.weight, std=0.5)
    save_weights(folder / "gpt.safetensors", generator.state_dict(), config=generator.config)
    tokenizer = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=64))
    save_weights(folder / "vq.safetensors", tokenizer.state_dict(), config=tokenizer.config)
    return folder


@pytest.fixture
def small(start):
    """Flags that make a recipe small."""
    return [
        "--model.name", "GPT-tiny", "--model.checkpoint", start / "gpt.safetensors", "--model.num_classes", 10,
        "--tokenizer.name", "VQ-tiny", "--tokenizer.codebook_size", 64, "--tokenizer.downsample_size", 4,
        "--tokenizer.checkpoint", start / "vq.safetensors", "--data.name", "digits", "--data.path", "none",
        "--data.image_size", 24, "--data.num_workers", 0, "--training.mixed_precision", "fp32",
        "--training.batch_size", 8, "--metrics.image_interval", 0, "--checkpoint.interval", 0,
    ]  # fmt: skip


def plain(lines, *names):
    return [[line[name] for name in ("loss", "grad_norm", *names)] for line in lines]


def distance(student, teacher, *, cfg_scale, temperature):
    """Forward and reverse KL a token on samples of the student."""
    classes = torch.arange(40) % 10
    tokens = generate(student, classes, seed=7)
    with torch.no_grad():
        own = hidden_states(student, tokens[:, :-1], ClassCondition(classes)).flatten(0, 1)
        other = hidden_states(teacher, tokens[:, :-1], ClassCondition(classes), cfg_scale=cfg_scale).flatten(0, 1)
        weights = student.output.weight, teacher.output.weight
        kl = linear_kl(own, weights[0], other, weights[1], teacher_temperature=temperature)
    return [direction.mean().item() for direction in kl]


@pytest.mark.parametrize("reverse_share", [0.0, 1.0])
def test_distillation_approaches_the_guided_teacher(run_here, small, start, tmp_path, reverse_share):
    flags = [
        "--config",
        "quickstart/distill",
        *small,
        "--distill.reverse_share",
        reverse_share,
        "--distill.cfg_scale",
        3,
    ]
    flags += ["--training.steps", 24, "--optimizer.lr", 5e-4, "--training.ema_decay", 0.5]
    lines = run_here("distill", *flags, "--metrics.run_dir", tmp_path)
    assert all(line["loss"] == pytest.approx(line["kl" if reverse_share else "kl_forward"]) for line in lines)
    teacher = load_gpt(start / "gpt.safetensors")
    settings = {"cfg_scale": 3.0, "temperature": 0.9}
    before = distance(teacher, teacher, **settings)
    assert before[0] == pytest.approx(lines[0]["kl_forward"], rel=0.3)  # of other samples
    for name in ("model", "model_ema"):
        after = distance(load_gpt(tmp_path / f"{name}.safetensors"), teacher, **settings)
        assert max(after) < 0.75 * max(before), (name, after, before)


def test_cca_learns_which_condition_an_image_has(run_here, small, tmp_path):
    flags = ["--config", "quickstart/cca", *small, "--training.steps", 12, "--optimizer.lr", 3e-3]
    lines = run_here("finetune", *flags, "--finetune.beta", 0.1, "--metrics.run_dir", tmp_path)
    start = lines[0]
    assert start["log_ratio"] == start["other_log_ratio"] == 0  # the reference is the model
    assert lines[-1]["log_ratio"] > lines[-1]["other_log_ratio"] + 1
    assert lines[-1]["loss"] < start["loss"]


def test_gft_mixes_the_logits_of_the_conditional_and_the_unconditional_model(run_here, small, tmp_path):
    """At beta 1 its loss is the conditional cross-entropy; below it begins elsewhere, and falls."""
    flags = ["--config", "quickstart/gft", *small, "--training.steps", 6, "--optimizer.lr", 3e-3]
    flags += ["--optimizer.schedule", "constant", "--optimizer.warmup_steps", 0]
    mixed = run_here("finetune", *flags, "--metrics.run_dir", tmp_path / "mixed")
    alone = run_here("finetune", *flags, "--finetune.beta", 1, "--metrics.run_dir", tmp_path / "alone")
    assert all(line["loss"] == pytest.approx(line["conditional_ce"], rel=1e-5) for line in alone)
    assert mixed[0]["conditional_ce"] == pytest.approx(alone[0]["conditional_ce"], rel=1e-6)
    assert abs(mixed[0]["loss"] - mixed[0]["conditional_ce"]) > 0.01
    assert mixed[-1]["loss"] < mixed[0]["loss"]


@pytest.mark.parametrize(("job", "config", "names"), [
    ("finetune", "published/cca_l_384", ["log_ratio", "other_log_ratio"]),
    ("finetune", "published/gft_l_384", ["conditional_ce"]),
    ("distill", "quickstart/distill", ["kl", "kl_forward"]),
])  # fmt: skip
def test_resumed_and_on_two_ranks(run_here, run_on_two, small, tmp_path, job, config, names):
    """With the published dropouts, whose masks are those of the images; two ranks have other micro-batches."""
    flags = ["--config", config, *small, "--optimizer.schedule", "constant", "--optimizer.lr", 1e-3]
    flags += ["--training.ema_decay", 0.9]
    one = run_here(job, *flags, "--training.steps", 3, "--metrics.run_dir", tmp_path / "one")
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in one)
    broken = [*flags, "--metrics.run_dir", tmp_path / "broken"]
    run_here(job, *broken, "--training.steps", 2)
    assert plain(run_here(job, *broken, "--training.steps", 3), *names) == plain(one, *names)
    files = [read_weights(tmp_path / name / "model_ema.safetensors")["norm.weight"] for name in ("one", "broken")]
    assert files[0].equal(files[1])
    if "gft" in config:
        return  # its images have nothing to do with each other
    parts = [*flags, "--training.micro_batch_size", 2, "--training.steps", 3]
    parts = [*parts, "--metrics.run_dir", tmp_path / "two", "--checkpoint.save_final", "false"]
    two = run_on_two(job, *parts)
    close = [pytest.approx(line, rel=2e-4, abs=1e-5) for line in plain(one, *names)]
    assert plain(two, *names) == close


def test_classes_alone_are_enough_to_distil(run_here, small, tmp_path):
    flags = [text if text != "digits" else "classes" for text in map(str, small)]
    (line,) = run_here("distill", *flags, "--training.steps", 1, "--metrics.run_dir", tmp_path)
    assert line["kl"] > 0


@pytest.mark.parametrize(("job", "flags", "problem"), [
    ("finetune", ["--finetune.loss", "gft", "--finetune.beta", 1.5], "finetune.beta = 1.5 must be at most 1"),
    ("finetune", ["--data.name", "classes"], "has no images: `grpo finetune` trains on them"),
    ("finetune", ["--training.batch_size", 1], "training.batch_size must be at least 2"),
    ("distill", ["--model.checkpoint", "none"], "model.checkpoint is required"),
    ("distill", ["--judge.interval", 5], "judge.interval needs one of judge.feature_checkpoint"),
    ("distill", ["--checkpoint.keep_best", 1, "--checkpoint.best_metric", "judge/fid"], "needs judge.interval"),
])  # fmt: skip
def test_what_cannot_work_is_refused(run_here, small, tmp_path, job, flags, problem):
    given = {str(flag) for flag in flags[::2]}
    pairs = zip(small[::2], small[1::2], strict=True)
    rest = [text for pair in pairs if pair[0] not in given for text in pair]
    with pytest.raises(UserError, match=problem):
        run_here(job, *rest, *flags, "--metrics.run_dir", tmp_path)
