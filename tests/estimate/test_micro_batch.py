"""The micro-batch that is chosen by the estimate."""

import json

import pytest

from grpo.config import ClassifierRecipe, FinetuneRecipe, GRPORecipe, PretrainRecipe, UserError, load_recipe
from grpo.estimate import recipe_memory, with_micro_batch
from grpo.jobs.memory import main as memory_table
from grpo.jobs.train_grpo import main
from grpo.parallel import GIB
from grpo.training.dry_run import dry_run

DATA = ["--data.name", "synthetic", "--tokenizer.name", "VQ-16", "--data.image_size", "256"]
SAMPLED = [
    *DATA, "--rollout.mode", "autoregressive", "--reward.reconstruction.weight", "0", "--reward.jpeg_size.weight", "1",
    "--rollout.batch_size", "24", "--rollout.num_generations", "8", "--model.name", "GPT-L",
]  # fmt: skip
CHOSEN = ["--training.micro_batch_size", "0"]


def rows(kind, *flags, memory, ranks=1):
    """The chosen size, and the estimate with it."""
    recipe = load_recipe(kind, [*flags, *CHOSEN])
    chosen = with_micro_batch(recipe, mesh=(ranks,), memory=memory)
    return chosen.training.micro_batch_size, recipe_memory(chosen, mesh=(ranks,), memory=memory or 0)


def test_the_published_run_fills_an_h100():
    """With 32 images at once, which were measured to be the fastest there; the next divisor would not fit."""
    flags, memory = ["--config", "published/vapi_xxl_384_one_gpu"], 79 * GIB
    size, estimate = rows(GRPORecipe, *flags, memory=memory)
    larger = load_recipe(GRPORecipe, [*flags, "--training.micro_batch_size", "64"])
    assert size == 32
    assert estimate.peak <= 0.9 * memory < recipe_memory(larger, mesh=(1,), memory=memory).peak


def test_where_nothing_fits_rows_are_single():
    assert rows(GRPORecipe, *SAMPLED, memory=GIB)[0] == 1


def test_a_rollout_that_fills_the_memory_does_not_count():
    """It takes most of what is free, whatever the micro-batch is."""
    size, estimate = rows(GRPORecipe, *SAMPLED, memory=12 * GIB)
    assert 1 < size < 192
    assert estimate.peaks["update"] <= 0.9 * 12 * GIB < estimate.peaks["rollout"]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(GRPORecipe, SAMPLED), (PretrainRecipe, DATA), (FinetuneRecipe, [*DATA, "--model.checkpoint", "gpt.pt"])],
)
def test_all_rows_at_once_on_a_cpu_and_where_they_fit(kind, flags):
    total = 192 if kind is GRPORecipe else 64
    assert rows(kind, *flags, memory=None)[0] == total
    assert rows(kind, *flags, memory=None, ranks=4)[0] == total // 4
    assert rows(kind, *flags, memory=1000 * GIB)[0] == total


def test_a_size_is_left_as_it_is_and_other_jobs_need_one():
    recipe = load_recipe(PretrainRecipe, DATA)
    assert with_micro_batch(recipe, mesh=(1,), memory=GIB) is recipe
    with pytest.raises(UserError, match=r"micro_batch_size must be at least 1: `grpo classifier` has no estimate"):
        load_recipe(ClassifierRecipe, ["--data.name", "digits", *CHOSEN])


def test_losses_are_equal_and_a_run_goes_on(tmp_path):
    """Of the debug recipe, whose 4 images are cut in two otherwise; and bit-equal after a stop."""

    def curve(name, *flags):
        folder = tmp_path / name
        main(["--config", "debug", "--metrics.run_dir", str(folder), "--metrics.image_interval", "0", *flags])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]

    cut = curve("cut", "--training.micro_batch_size", "1")
    whole = curve("whole", *CHOSEN)
    assert cut != whole
    assert [pytest.approx(pair, rel=1e-4, abs=1e-6) for pair in cut] == whole
    log, saved = ((tmp_path / "whole" / name).read_text() for name in ("log.txt", "recipe.toml"))
    assert "training.micro_batch_size = 0: " in log
    assert "micro_batch_size = 0" not in saved
    curve("stopped", *CHOSEN, "--training.steps", "3")
    assert curve("stopped", *CHOSEN) == whole


def test_the_dry_run_and_the_table_tell_it(capsys):
    flags = ["--config", "published/vapi_xxl_384_one_gpu", "--data.name", "synthetic", "--data.path", "none"]
    flags += ["--model.checkpoint", "none", "--tokenizer.checkpoint", "none", "--reward.lpips.weight", "0", *CHOSEN]
    dry_run("train", flags)
    assert "training.micro_batch_size = 0: 32 rows at once, what fits into 80 GiB of a GPU" in capsys.readouterr().out
    memory_table(["--config", "debug", "--gpus", "2", *CHOSEN])
    assert any(line.split() == ["rows", "at", "once", "2", "2", "2"] for line in capsys.readouterr().out.splitlines())
