"""Dropout in the update: an honest ratio, and masks that depend on nothing but their rows."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from grpo.config import Objective
from grpo.data import ImageBatch
from grpo.kernels import Draw
from grpo.models import GPT, ClassCondition, GPTConfig
from grpo.parallel import MetricSums
from grpo.parallel.activation_checkpoint import checkpoint_activations
from grpo.rollout import Trajectory, build_rollout, real_rows, score
from tests.training.test_update import B, G, T, V, make_update, relative_difference

EVAL, TRAIN, TWICE = (False,), (True,), (False, True)
OBJECTIVE = Objective(clip_range=0.2, kl="k3", kl_coef=0.05, aux_ce_weight=0.1, entropy_weight=0.01)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layer": 2, "n_head": 2, "vocab_size": V, "block_size": T, "num_classes": 5}
    model = GPT(GPTConfig(**sizes, dropout=0.2, class_dropout=0.5))
    torch.nn.init.normal_(model.output.weight, std=0.3)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    return model


def trajectory_of(update, *, rows=B, first=0):
    """A rollout of `rows` images with advantages; all that is random depends on the images' numbers."""
    ids = torch.arange(first, first + rows)
    codes = torch.randint(V, (100, T), generator=torch.Generator().manual_seed(1))
    model = update.policy
    sample = build_rollout(
        model, lambda batch: codes[batch.sample_ids], update.rollout, draw=update.draw, schedule=update.schedule
    )
    trajectory = sample(ImageBatch(torch.zeros(rows, 0), ClassCondition(ids % 5), ids, ids))
    advantages = torch.randn(100, G, generator=torch.Generator().manual_seed(2))[ids]
    trajectory.advantages = advantages.view(trajectory.tokens.shape[:2])
    return trajectory


def run(model, *, reference=None, **settings):
    """(gradients of each optimizer step, metrics) of a rollout of B images, in the parts that its schedule wants."""
    update = make_update(model, **{"objective": OBJECTIVE, "micro_batch": 2, **settings})
    update.reference = reference
    size, metrics = update.schedule.images_per_part, MetricSums()
    for first in range(0, B, size):
        metrics.merge(update(trajectory_of(update, rows=size, first=first)))
    return update.optimizer.gradients, metrics.means()


@pytest.fixture
def reference(model):
    """Another model with the same dropouts."""
    other = deepcopy(model).requires_grad_(False)
    for parameter in other.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("mode", ["teacher_forced", "autoregressive"])
@pytest.mark.parametrize("passes", [TRAIN, TWICE], ids=["train", "twice"])
@pytest.mark.parametrize("step", [B * G, G, 2], ids=["on-policy", "a step an image", "three steps an image"])
def test_the_ratio_of_an_untouched_policy_is_one_and_its_kl_zero(model, step, passes, mode):
    """The recorder never changes the weights, so this holds in every optimizer step of a rollout."""
    gradients, metrics = run(model, reference=deepcopy(model), step=step, passes=passes, mode=mode)
    assert len(gradients) == B * G // step
    assert metrics["ratio"] == 1.0
    assert metrics["clip_fraction"] == metrics["kl"] == 0.0


def test_a_rollout_that_is_passed_through_again_has_the_same_masks(model):
    gradients, metrics = run(model, reference=deepcopy(model), step=G, epochs=2, passes=TRAIN)
    assert metrics["ratio"] == 1.0
    first, again = gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]
    assert all(
        torch.equal(a, b) for ours, theirs in zip(first, again, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


def test_without_the_masks_the_ratio_would_measure_dropout(model):
    """What the reference trainer compares: log-probs with dropout to those of the rollout, without."""
    update = make_update(model, micro_batch=B, objective=OBJECTIVE, passes=TRAIN)
    trajectory = trajectory_of(update)
    dropped = replace(trajectory, drops=True)
    ratios = (update.score(model, dropped) - update.score(model, trajectory)).exp()
    assert (ratios - 1).abs().mean() > 0.1
    assert torch.equal(update.score(model, dropped), update.score(model, dropped))


def test_twice_is_the_mean_of_both_passes(model, reference):
    (plain, dropped, both), metrics = zip(
        *(run(model, reference=reference, passes=passes) for passes in (EVAL, TRAIN, TWICE)), strict=True
    )
    mean = [(a + b) / 2 for a, b in zip(*plain, *dropped, strict=True)]
    assert relative_difference(*both, mean) < 1e-5
    assert relative_difference(*both, *plain) > 0.05
    for name in ("loss", "aux_ce", "entropy", "surrogate", "kl"):
        assert metrics[2][name] == pytest.approx((metrics[0][name] + metrics[1][name]) / 2, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("mode", ["teacher_forced", "autoregressive"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_gradient_does_not_depend_on_the_micro_batch(model, reference, mode, micro_batch):
    settings = {"reference": reference, "passes": TRAIN, "mode": mode}
    (whole,), _ = run(model, micro_batch=B, **settings)
    (cut,), _ = run(model, micro_batch=micro_batch, **settings)
    assert relative_difference(cut, whole) < 1e-5


def test_guided_rows_drop_what_their_unconditional_counterparts_drop(model):
    """At scale 1 by the guided path, which doubles the rows, the conditional half decides alone."""
    update = make_update(model, micro_batch=4, objective=OBJECTIVE, passes=TRAIN)
    dropped = replace(trajectory_of(update), drops=True, target_tokens=None)
    nearly = score(model, dropped, draw=Draw(), cfg_scale=1.0 + 1e-6).log_probs
    torch.testing.assert_close(nearly, score(model, dropped, draw=Draw()).log_probs, rtol=1e-4, atol=1e-4)
    unconditional = replace(dropped, condition=dropped.condition.unconditional())
    none = score(model, dropped, draw=Draw(), cfg_scale=1e-6).log_probs
    torch.testing.assert_close(none, score(model, unconditional, draw=Draw()).log_probs, rtol=1e-4, atol=1e-4)


def test_real_rows_beside_completions_have_masks_of_their_own(model):
    update = make_update(model, micro_batch=4, objective=OBJECTIVE, passes=TRAIN, mode="autoregressive")
    trajectory = trajectory_of(update)
    assert trajectory.row_ids.tolist() == list(range(B * G))
    assert trajectory.real.row_ids.tolist() == [-1, -2, -3, -4]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_and_compilation_keep_the_masks(model, recompute, compiled):
    """Bit for bit; and identical blocks are still compiled once, whatever their number."""
    codes = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    real = replace(real_rows(ClassCondition(torch.arange(B)), codes, row_ids=torch.arange(B)), drops=True)
    expected = gradients_of_targets(model, real)
    other = deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    for block in other.layers:
        checkpoint_activations(block, recompute)
        if compiled:
            block.compile(backend="aot_eager")
    for ours, plain in zip(gradients_of_targets(other, real), expected, strict=True):
        assert torch.equal(ours, plain)
    assert counters["stats"]["unique_graphs"] == int(compiled)
    assert not counters["graph_break"]


def gradients_of_targets(model: GPT, rows: Trajectory) -> list[torch.Tensor]:
    return torch.autograd.grad(score(model, rows, draw=Draw()).target_log_probs.sum(), list(model.parameters()))
