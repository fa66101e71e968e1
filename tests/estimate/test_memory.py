"""The memory estimate against memory that is measured; shards are measured in tests/parallel/test_all_modes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.checkpoint.state import optimizer_tensors
from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.estimate import recipe_memory
from grpo.estimate.memory import models_on_meta
from grpo.formats import Adapter
from grpo.jobs.memory import gib, main
from grpo.models import GPT, GPTConfig, TextCondition, add_adapter, generator_sizes, mark_trained
from grpo.models.costs import activation_bytes, block_rows
from grpo.parallel import GIB
from grpo.parallel.activation_checkpoint import checkpoint_activations
from grpo.training import GuardedOptimizer
from tests.estimate.live_bytes import LiveBytes

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = ["--training.batch_size", "8192"]
SAMPLED = [
    "--rollout.mode", "autoregressive", "--reward.reconstruction.weight", "0", "--reward.lpips.weight", "0",
    "--reward.class_log_prob.weight", "1",
    "--reward.class_log_prob.checkpoint", "classifier.pth",
]  # fmt: skip
SIZES = [(128, 8, 4, 64, 4), (256, 4, 4, 144, 2)]  # D, layers, heads, T, sequences


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_within_an_eighth_of_the_measured_ones(size, dtype, mode):
    """On a CPU attention computes in fp32 also under bf16, so the estimate, which is for GPUs, is lower there."""
    dim, layers, heads, length, sequences = size
    config = GPTConfig(dim=dim, n_layer=layers, n_head=heads, vocab_size=64, block_size=length)
    model = GPT(config).to(dtype)
    for block in model.layers:
        checkpoint_activations(block, mode)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    tokens = torch.zeros(sequences, length - 1, dtype=torch.int64)
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        hidden = model.hidden(tokens, torch.zeros(sequences, dtype=torch.int64))
        hidden.float().square().sum().backward()
    estimate = activation_bytes(config, sequences * length, dtype=dtype, mode=mode)
    assert estimate == pytest.approx(live.peak, rel=0.125)


def test_activations_with_the_rows_of_a_text():
    """Of 24 tokens before 64 codes; their attention keeps less than the estimate has it."""
    config = GPTConfig(dim=128, n_layer=4, n_head=4, vocab_size=64, block_size=64, cls_token_num=24, caption_dim=8)
    model, texts = GPT(config), TextCondition(torch.zeros(4, 24, 8), torch.ones(4, 24, dtype=torch.bool))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        model.hidden(torch.zeros(4, 63, dtype=torch.int64), texts).float().square().sum().backward()
    estimate = activation_bytes(config, block_rows(config, 4), dtype=torch.float32, mode="none")
    assert estimate == pytest.approx(live.peak, rel=0.125)


def estimate(*flags, mesh=(8,), memory=80 * GIB):
    """Of the published run in micro-batches of 8 with full recomputation, unless the flags say otherwise."""
    small = {"--training.micro_batch_size": "8", "--activation_checkpoint.mode": "full"}
    small |= dict(zip(flags[::2], flags[1::2], strict=True))
    arguments = ["--config", "published/vapi_xxl_384", *(text for pair in small.items() for text in pair)]
    return recipe_memory(load_recipe(GRPORecipe, arguments), mesh=mesh, memory=memory)


def test_settings_move_what_they_should():
    plain = estimate()
    assert estimate("--parallel.defer_gradient_sync", "false").lasting["unreduced gradients"] == 0
    assert plain.lasting["unreduced gradients"] == pytest.approx(8 * plain.lasting["weights"], rel=1e-3)
    assert "reference" not in plain.lasting
    assert estimate("--objective.kl", "k3").lasting["reference"] == plain.lasting["weights"]
    moving = estimate("--objective.kl", "k3", "--objective.reference", "ema", "--training.ema_decay", "0.99").lasting
    assert moving == {**plain.lasting, "average": plain.lasting["weights"]}
    rewarding = ["--objective.kl", "k3", "--reward.log_ratio.weight", "1"]
    assert estimate(*rewarding).lasting["reference"] == plain.lasting["weights"]  # shared with the KL term's
    other = estimate(*rewarding, "--objective.reference_checkpoint", "other.pt").lasting
    assert other["reference"] == 2 * plain.lasting["weights"]
    two_hosts = estimate("--training.micro_batch_size", "4", mesh=(2, 8))
    assert two_hosts.lasting == plain.lasting
    assert (
        estimate("--training.micro_batch_size", "4").phases["update"]["activations"]
        < (plain.phases["update"]["activations"])
    )
    one_forward = estimate(mesh=(16,)).lasting  # 8 images a rank are one micro-batch: no gradient waits
    assert one_forward["unreduced gradients"] == 0
    assert estimate("--activation_checkpoint.mode", "none").peak > plain.peak
    gathered = estimate("--parallel.data_parallel", "sdp").phases["update"]["gathered weights"]
    assert gathered > 5 * plain.phases["update"]["gathered weights"]


def test_one_gpu_holds_the_published_run():
    """With a tenth to spare; what it gathers stays until the step, and is reduced when the activations are gone."""
    arguments = ["--config", "published/vapi_xxl_384_one_gpu", "--training.micro_batch_size", "32"]
    alone = recipe_memory(load_recipe(GRPORecipe, arguments), mesh=(1,), memory=80 * GIB)
    assert alone.peak < 72 * GIB
    assert alone.phases["reward"]["gathered weights"] == alone.phases["update"]["gathered weights"] > 2.5 * GIB
    assert alone.phases["reduction"]["reduction"] == 3 * alone.phases["update"]["whole gradients"]


def measured_peaks():
    """Flags of steps that were run on an H100 (benchmarks/results), and their peaks in bytes."""
    results = ROOT / "benchmarks" / "results"
    run = json.loads((results / "2026-11-26-1215-gpu-run.json").read_text())
    yield {"--training.micro_batch_size": "32"}, run["sides"]["ours"]["whole_peak_bytes"]
    variants = json.loads((results / "2026-11-26-1134-gpu-variants.json").read_text())
    for name, numbers in variants["variants"]["updates"].items():
        _, mode, rows = name.split(", ")
        batch = {"--rollout.batch_size": "64", "--training.batch_size": "512"}
        flags = {"--activation_checkpoint.mode": mode, "--training.micro_batch_size": rows}
        yield batch | flags, numbers["peak_gb"] * 1e9


@pytest.mark.parametrize(("flags", "peak"), [*measured_peaks()])
def test_what_an_h100_took_is_less_than_the_estimate_by_no_more_than_a_quarter(flags, peak):
    """Compiled blocks keep less than the formulas have it: most of all where nothing is recomputed."""
    arguments = ["--config", "published/vapi_xxl_384_one_gpu", *(text for pair in flags.items() for text in pair)]
    expected = recipe_memory(load_recipe(GRPORecipe, arguments), mesh=(1,), memory=79 * GIB)
    assert peak <= expected.peaks["update"] <= peak / 0.75


def test_sizes_that_follow_the_free_memory_stay_inside_of_it():
    for memory in (24 * GIB, 80 * GIB):
        free = estimate("--reward.batch_size", "0", "--rollout.batch_size", "1024", *ONE_STEP, memory=memory)
        assert free.peak <= memory
        sampled = estimate(*SAMPLED, memory=memory)
        assert 0 < sampled.phases["rollout"]["cache"] < memory


def test_the_networks_of_rewards_are_as_large_as_their_files(tmp_path):
    small, large = tmp_path / "small.pth", tmp_path / "large.pth"
    small.write_bytes(bytes(10))
    large.write_bytes(bytes(1010))
    sizes = [estimate(*SAMPLED[:-1], str(file)).lasting["tokenizer and rewards"] for file in (small, large)]
    assert sizes[1] - sizes[0] == 1000


def test_a_batch_that_the_ranks_cannot_share_is_a_mistake():
    with pytest.raises(UserError, match=r"rollout\.batch_size = 128 cannot be shared by 3 ranks"):
        estimate(mesh=(3,))


def test_the_program_prints_a_table(capsys):
    flags = ["--config", "debug", "--gpus", "4", "--hosts", "2"]
    main(flags)
    text = capsys.readouterr().out
    assert text.startswith("GPT-tiny, 4 GPUs on 2 host(s), GiB on one GPU\n")
    assert len(next(line for line in text.splitlines() if line.startswith("peak")).split()) == 4
    main([*flags, "--all-sizes"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| model | fsdp | sdp | hsdp |"
    assert [line.split()[1] for line in table[2:]][-1] == "GPT-7B"
    assert len(table) == 2 + 8


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--gpus", "three"], "--gpus"),
        (["--gpus", "3", "--hosts", "2"], "--hosts"),
        (["--config", "quickstart/tokenizer"], "grpo tokenizer"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_mistake_is_one_line(flags, line):
    command = [sys.executable, "-m", "grpo", "memory", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    (only,) = result.stderr.splitlines()
    assert line in only


def trained_bytes(flags):
    """What a recipe trains of a small model on one rank in fp32: bytes of weights, gradients and moments."""
    recipe = load_recipe(GRPORecipe, ["--config", "debug", *flags])
    torch.manual_seed(0)
    config = generator_sizes(recipe.model, recipe.tokenizer, image_size=recipe.data.image_size)
    model = mark_trained(GPT(config), recipe.model, recipe.lora)
    optimizer = GuardedOptimizer(model, recipe.optimizer, total_steps=1, max_skipped_steps=1)
    tokens = torch.zeros(2, config.block_size - 1, dtype=torch.int64)
    optimizer.backward(model(tokens, torch.zeros(2, dtype=torch.int64)).square().mean())
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    moments = [
        tensor
        for name, tensor in optimizer_tensors(model, optimizer.adamw).items()
        if not name.endswith(".step")
    ]  # fmt: skip
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in (model.parameters(), moments)]
    return recipe, [sizes[0], gradients, sizes[1]]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("lora", [(), ("--lora.rank", "16"), ("--lora.rank", "64", "--lora.targets", "wo,w1")])
def test_what_lasts_is_as_measured(lora, name):
    if name == "adamw_8bit":
        pytest.importorskip("torchao", reason="it is torchao's")
    recipe, measured = trained_bytes([*lora, "--optimizer.name", name])
    lasting = recipe_memory(recipe, mesh=(1,), memory=24 * GIB).lasting
    assert [lasting[part] for part in ("weights", "gradients", "optimizer")] == measured


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_activations_with_an_adapter_are_near_the_measured_ones(mode):
    dim, layers, heads, length, sequences = SIZES[0]
    config = GPTConfig(dim=dim, n_layer=layers, n_head=heads, vocab_size=64, block_size=length)
    adapter = Adapter(rank=32, alpha=32.0, targets=("wqkv", "wo", "w1", "w2", "w3"))
    model = add_adapter(GPT(config), adapter)
    for block in model.layers:
        checkpoint_activations(block, mode)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.zeros(sequences, length - 1, dtype=torch.int64)
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
    with LiveBytes(known) as live:
        hidden = model.hidden(tokens, torch.zeros(sequences, dtype=torch.int64))
        hidden.float().square().sum().backward()
    estimated = activation_bytes(config, sequences * length, dtype=torch.float32, mode=mode, adapter=adapter)
    assert estimated == pytest.approx(live.peak, rel=0.15)


def test_an_adapter_takes_little_and_its_reference_nothing():
    whole, adapted = (estimate("--objective.kl", "k3", *lora) for lora in ((), ("--lora.rank", "16")))
    assert "reference" in whole.lasting
    assert "reference" not in adapted.lasting
    for parts in (("optimizer",), ("gradients", "unreduced gradients")):
        little, much = (sum(found.lasting[part] for part in parts) for found in (adapted, whole))
        assert 0 < little < 0.03 * much, parts
    other = estimate("--objective.kl", "k3", "--lora.rank", "16", "--objective.reference_checkpoint", "other.pt")
    assert other.lasting["reference"] == other.lasting["weights"]
    averages = [
        estimate("--training.ema_decay", ".9", *lora).lasting["average"] for lora in ((), ("--lora.rank", "16"))
    ]
    assert averages[1] < 0.03 * averages[0]


def test_jobs_without_rewards(capsys):
    def peak(config, *flags):
        main(["--config", config, "--gpus", "1", "--memory", "24", *flags])
        rows = (
            line.rsplit(maxsplit=3)
            for line in capsys.readouterr().out.splitlines()
            if line.endswith(tuple("0123456789"))
        )
        return {name.strip(): float(fsdp) for name, fsdp, *_ in rows}

    sizes = ("--model.name", "GPT-L", "--training.mixed_precision", "bf16", "--training.batch_size", "64")
    distilled, own = peak("quickstart/distill", *sizes), ("--distill.teacher_checkpoint", "other.pt")
    assert {"reference", "cache", "activations", "peak"} <= distilled.keys()
    adapted = peak("quickstart/distill", *sizes, "--lora.rank", "8")
    assert "reference" not in adapted
    assert "reference" in peak("quickstart/distill", *sizes, "--lora.rank", "8", *own)
    cca, gft = (peak(f"quickstart/{name}", *sizes) for name in ("cca", "gft"))
    assert "reference" in cca
    assert "reference" not in gft
    assert cca["activations"] == pytest.approx(2 * gft["activations"], rel=0.01)


PUBLISHED = ["--config", "published/vapi_xxl_384", "--reward.batch_size", "32"]
PUBLISHED += ["--parallel.defer_gradient_sync", "false"]
ONE, EIGHT, TWO_HOSTS = ("fsdp", (1,)), ("fsdp", (8,)), ("hsdp", (2, 8))
TABLES = {  # by what stands before a table in docs/scaling.md: flags, and mode and mesh of the columns
    "other sizes below": ([], [ONE, EIGHT, TWO_HOSTS]),
    "--training.dropout_mode eval": (
        ["--training.dropout_mode", "eval"],
        [ONE, EIGHT, ("sdp", (8,)), ("fsdp", (16,)), TWO_HOSTS],
    ),
}


@pytest.mark.parametrize("place", TABLES)
@pytest.mark.parametrize("model", ["GPT-XXL", "GPT-7B"])
def test_tables_of_the_page_are_what_is_calculated(place, model):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").partition(place)[2]
    _, *written = next(line for line in page.splitlines() if line.startswith(f"| {model} |")).strip("| ").split(" | ")
    flags, columns = TABLES[place]
    calculated, models = [], None
    for mode, mesh in columns:
        more = ["--parallel.data_parallel", mode, "--model.name", model]
        recipe = load_recipe(GRPORecipe, [*PUBLISHED, *flags, *more])
        models = models or models_on_meta(recipe)
        calculated.append(gib(recipe_memory(recipe, mesh=mesh, memory=80 * GIB, models=models).peak))
    assert written == calculated
