"""Rollouts: what is drawn, under which distribution, and that nothing depends on how work is cut."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.config import Objective, Rollout, Schedule, Training
from grpo.kernels import CHUNK_ELEMENTS, Draw, sample_and_score
from grpo.models import ClassCondition, GPTConfig, load_gpt
from grpo.rollout import build_draw, build_rollout, generate, real_rows, sample_codes, score
from grpo.rollout.modes import perturb

sample_and_score_module = sys.modules[sample_and_score.__module__]  # the package has a function of its name
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "llamagen"


@pytest.mark.parametrize(("scale", "interval"), [(1, -1), (4, -1), (2, 8)])
def test_greedy_generation_equals_llamagen(scale, interval):
    expected = torch.load(FIXTURES / "expected.pt", weights_only=True)
    sizes = json.loads((FIXTURES / "config.json").read_text())["gpt"]
    model = load_gpt(FIXTURES / "gpt_c2i.pt", GPTConfig(**sizes))
    tokens = generate(model, expected["class_ids"], cfg_scale=scale, cfg_interval=interval, top_k=1)
    assert torch.equal(tokens, expected[f"greedy_cfg{scale}_interval{interval}"])


def make(model, encode, *, trains=False, with_targets=True, **config):
    """A rollout of 6 images x 4 completions that feeds one optimizer step, or else two."""
    rollout = Rollout(num_generations=4, batch_size=6, **config)
    training = Training(batch_size=24 if trains else 12, seed=7)
    objective = Objective(aux_ce_weight=0.1 if with_targets else 0.0)
    schedule = Schedule.of(rollout=rollout, training=training, objective=objective, ranks=1)
    return build_rollout(model, encode, rollout, draw=build_draw(rollout, seed=7, impl="auto"), schedule=schedule)


def teacher_forced(model, encode, **config):
    return make(model, encode, **config)


def autoregressive(model, **config):
    return make(model, None, with_targets=False, mode="autoregressive", **config)


def test_teacher_forced_shapes_and_log_probs(model, encode, batch):
    trajectory = teacher_forced(model, encode, temperature=0.8)(batch)
    assert trajectory.tokens.shape == trajectory.old_log_probs.shape == (6, 4, 16)
    assert torch.equal(trajectory.context, encode(batch)[:, :-1])
    scores = score(model, trajectory, draw=Draw(temperature=0.8))
    torch.testing.assert_close(scores.log_probs, trajectory.old_log_probs, rtol=1e-5, atol=1e-5)
    logits = model(trajectory.context, trajectory.condition).double()
    p = torch.log_softmax(logits / 0.8, dim=-1)
    torch.testing.assert_close(scores.entropy.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-5)
    targets = torch.log_softmax(logits, dim=-1).gather(-1, encode(batch)[..., None])[..., 0]
    torch.testing.assert_close(scores.target_log_probs.double(), targets, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampling_forward_can_be_the_training_forward(model, encode, batch, temperature, kept, monkeypatch):
    """What the rollout hands over has the values and the gradients of scores with a forward of their own."""
    monkeypatch.setattr(sample_and_score_module, "_KEPT_ELEMENTS", {"cpu": 1 << 24} if kept else {})
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 20 * 64)  # the last chunk is shorter
    trajectory = teacher_forced(model, encode, trains=True, temperature=temperature)(batch)
    plain = teacher_forced(model, encode, temperature=temperature)(batch)
    assert torch.equal(trajectory.tokens, plain.tokens)
    assert plain.scores is None
    results = []
    for scores in (trajectory.scores, score(model, plain, draw=Draw(temperature=temperature))):
        model.zero_grad()
        log_probs, entropy, targets = scores
        (log_probs.square().sum() + entropy.square().sum() + targets.square().sum()).backward()
        results.append([*scores, *(parameter.grad.clone() for parameter in model.parameters())])
    for handed_over, again in zip(*results, strict=True):
        assert (handed_over - again).norm() < 1e-5 * again.norm()
    assert torch.equal(trajectory.old_log_probs, trajectory.scores.log_probs)


def test_targets_are_scored_at_temperature_one_only_where_they_are_wanted(model, encode, batch):
    for temperature, wanted, scored in ((1.0, False, True), (0.7, True, True), (0.7, False, False)):
        rollout = teacher_forced(model, encode, trains=True, with_targets=wanted, temperature=temperature)
        assert (rollout(batch).scores.target_log_probs is not None) == scored


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.7}, {"top_k": 10, "top_p": 0.9}, {"temperature": 0.7}])
def test_autoregressive_log_probs_are_those_of_the_loss(model, batch, settings):
    trajectory = autoregressive(model, **settings)(batch)
    assert trajectory.tokens.shape == (24, 1, 16)
    assert torch.equal(trajectory.context, trajectory.tokens[:, 0, :-1])
    assert torch.equal(trajectory.condition.class_ids, batch.condition.class_ids.repeat_interleave(4))
    scores = score(
        model,
        trajectory,
        draw=Draw(temperature=settings.get("temperature", 1.0)),
        cfg_scale=settings.get("cfg_scale", 1.0),
    )
    torch.testing.assert_close(scores.log_probs, trajectory.old_log_probs, rtol=1e-4, atol=1e-4)
    assert (trajectory.kept_mass is not None) == ("top_k" in settings)


@pytest.mark.parametrize("mode", ["teacher_forced", "autoregressive"])
def test_draws_do_not_depend_on_the_split_or_order(model, encode, batch, mode):
    forced = mode == "teacher_forced"
    rollout = teacher_forced(model, encode, use_context_noise=True) if forced else autoregressive(model)
    whole = rollout(batch)
    parts = [rollout(part) for part in batch.parts(2)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.context, torch.cat([part.context for part in parts]))
    assert len(whole.tokens.flatten(0, 1).unique(dim=0)) == 24  # completions differ from each other


def test_bounded_rows_draw_the_same(model, batch):
    assert torch.equal(autoregressive(model)(batch).tokens, autoregressive(model, max_rows=5)(batch).tokens)


def test_other_seeds_and_samples_draw_differently(model, batch):
    class_ids = torch.zeros(4, dtype=torch.int64)
    images = generate(model, class_ids, seed=1)
    assert torch.equal(images, generate(model, class_ids, seed=1))
    assert not torch.equal(images, generate(model, class_ids, seed=2))
    assert torch.equal(images[2:], generate(model, class_ids[2:], seed=1, row_ids=torch.arange(2, 4)))


def test_sampled_frequencies_follow_the_model(model):
    """The first token of 4,000 images against its exact distribution: chi-square over the codes of mass > 0.1 %."""
    count = 4_000
    class_ids = torch.full((count,), 3)
    row_ids = torch.arange(count)
    first = sample_codes(model, ClassCondition(class_ids), row_ids=row_ids, draw=Draw()).tokens[:, 0]
    p = torch.softmax(model(torch.empty(1, 0, dtype=torch.int64), class_ids[:1])[0, 0].double(), dim=-1)
    expected, observed = p * count, first.bincount(minlength=64).double()
    likely = expected > 20
    statistic = ((observed - expected) ** 2 / expected)[likely].sum().item()
    degrees = int(likely.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_context_noise_replaces_the_stated_share(model):
    context, ids = torch.zeros(400, 15, dtype=torch.int64), torch.arange(400)
    noisy = perturb(context, ids, share=0.3, vocab_size=64, seed=0)
    assert (noisy != 0).float().mean().item() == pytest.approx(0.3 * 63 / 64, abs=0.02)
    assert noisy.max() == 63
    assert torch.equal(perturb(context, ids, share=0.0, vocab_size=64, seed=0), context)


def test_rows_without_completions_are_scored_on_their_targets(model, encode, batch):
    codes = encode(batch)
    scores = score(model, real_rows(batch.condition, codes), draw=Draw(temperature=0.5), cfg_scale=2.0)
    logits = model(codes[:, :-1], batch.condition)
    expected = torch.log_softmax(logits, dim=-1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(scores.target_log_probs, expected, rtol=1e-5, atol=1e-5)
    assert scores.log_probs.shape == (6, 0, 16)


def test_selecting_rows_and_completions(model, encode, batch):
    trajectory = teacher_forced(model, encode)(batch)
    part = trajectory.select(slice(2, 4), slice(1, 3))
    assert torch.equal(part.tokens, trajectory.tokens[2:4, 1:3])
    assert torch.equal(part.context, trajectory.context[2:4])
    assert [p.rows for p in trajectory.split(4)] == [4, 2]
    assert replace(part).num_completions == 4
