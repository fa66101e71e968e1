"""The shared-context update against the algorithm it replaces, and what its gradient must not depend on."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from grpo.config import Objective, Rollout, Schedule
from grpo.data import ImageBatch
from grpo.kernels import Draw
from grpo.models import GPT, ClassCondition, GPTConfig
from grpo.objectives import group_advantages
from grpo.rollout import Trajectory, build_rollout, real_rows, score
from grpo.training import PolicyUpdate

B, G, T, V = 4, 6, 16, 64


class Recorder:
    """Stands in for the optimizer: keeps the gradients of each step, never changes the weights."""

    def __init__(self, model):
        self.model, self.gradients = model, []

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.gradients.append([parameter.grad.clone() for parameter in self.model.parameters()])
        self.model.zero_grad()
        return {}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=V, block_size=T, num_classes=5)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    return model


@pytest.fixture
def trajectory():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(V, (B, T), generator=generator)
    log_probs = -4 + 0.5 * torch.randn(B, G, T, generator=generator)
    return Trajectory(
        condition=ClassCondition(torch.arange(B)),
        context=codes[:, :-1],
        tokens=torch.randint(V, (B, G, T), generator=generator),
        old_log_probs=log_probs,
        ref_log_probs=log_probs + 0.1 * torch.randn(B, G, T, generator=generator),
        target_tokens=codes,
        advantages=torch.randn(B, G, generator=generator),
        row_ids=torch.arange(B) + 100,
        completion_ids=torch.arange(B * G).view(B, G),
    )


def make_update(
    model, *, micro_batch, step=B * G, objective, images=B, temperature=1.0, epochs=1, passes=(False,), **rollout
):
    """An update that keeps gradients, for rollouts of `images` x G completions and `step` completions a step."""
    schedule = Schedule(
        ranks=1,
        images=images,
        group_size=G,
        completions_per_step=step,
        epochs=epochs,
        micro_batch_size=micro_batch,
        trains_sampling_forward=(
            rollout.get("mode") != "autoregressive" and step == images * G and epochs == 1 and False in passes
        ),
        scores_targets=objective.aux_ce_weight > 0,
        dropout_passes=passes,
    )
    draw = Draw(temperature=temperature)
    rollout = Rollout(batch_size=images, num_generations=G, **rollout)
    return PolicyUpdate(model, Recorder(model), objective=objective, rollout=rollout, draw=draw, schedule=schedule)


def gradients(model, trajectory, **settings):
    """Gradients of each optimizer step of the update."""
    update = make_update(model, **settings)
    update(trajectory)
    return update.optimizer.gradients


def naive_gradients(model, trajectory, *, on_policy, clip, kl_coef, aux_ce_weight, temperature):
    """The reference algorithm: every completion runs its own forward on a copy of the context, logits in full."""

    def repeated(tensor):
        return tensor.repeat_interleave(G, dim=0)

    logits = model(repeated(trajectory.context), trajectory.condition.repeat_interleave(G))  # [B*G, T, V]
    tokens, advantages = trajectory.tokens.flatten(0, 1), trajectory.advantages.flatten()[:, None]
    new = torch.log_softmax(logits / temperature, dim=-1).gather(-1, tokens[..., None])[..., 0]
    old = new.detach() if on_policy else trajectory.old_log_probs.flatten(0, 1)
    ratio = torch.exp(new - old)
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    difference = trajectory.ref_log_probs.flatten(0, 1) - new
    per_token = per_token + kl_coef * (difference.exp() - difference - 1)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), repeated(trajectory.target_tokens).flatten())
    loss = per_token.mean(dim=1).mean() + aux_ce_weight * cross_entropy
    return torch.autograd.grad(loss, list(model.parameters()))


def relative_difference(ours, theirs):
    """Norm of the difference of two lists of gradients over the norm of the second."""
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    return (torch.nn.utils.get_total_norm(difference) / torch.nn.utils.get_total_norm(theirs)).item()


def count_forwards(model):
    """A list that grows with every forward of the first block."""
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("on_policy", [True, False])
def test_gradient_equals_the_naive_algorithm(model, trajectory, on_policy, temperature):
    settings = {"kl_coef": 0.05, "aux_ce_weight": 0.1}
    (ours,) = gradients(
        model,
        trajectory,
        micro_batch=B * G,
        objective=Objective(clip_range=0.2, kl="k3", **settings),
        temperature=temperature,
        images=B if on_policy else 2 * B,
    )
    theirs = naive_gradients(model, trajectory, on_policy=on_policy, clip=0.2, temperature=temperature, **settings)
    assert relative_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("micro_batch", [1, 3, 12])
def test_gradient_does_not_depend_on_the_micro_batch(model, trajectory, loss, micro_batch):
    objective = Objective(
        loss=loss, clip_range=0.2, kl="k3", kl_coef=0.05, aux_ce_weight=0.1, entropy_weight=0.01, use_token_dropout=True
    )
    (whole,) = gradients(model, trajectory, micro_batch=B * G, objective=objective)
    (cut,) = gradients(model, trajectory, micro_batch=micro_batch, objective=objective)
    assert relative_difference(cut, whole) < 1e-5


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_terms_of_whole_sequences_and_chosen_tokens_do_not_depend_on_the_micro_batch(model, trajectory, loss):
    objective = Objective(
        loss=loss, clip_range=0.2, kl="k3", kl_coef=3.0, kl_level="sequence", entropy_token_share=0.3,
        use_token_dropout=True, entropy_weight=0.01, entropy_target=0.5,
    )  # fmt: skip
    updates = [make_update(model, micro_batch=size, objective=objective) for size in (B * G, 3, 1)]
    sums = [update(replace(trajectory)) for update in updates]
    whole, *cut = [update.optimizer.gradients[0] for update in updates]
    assert all(relative_difference(gradient, whole) < 1e-5 for gradient in cut)
    weights = [update.entropy_control.weight for update in updates]
    assert weights[1:] == [pytest.approx(weights[0], rel=1e-6)] * 2
    assert weights[0] != 0.01
    whole, *cut = [metrics.means() for metrics in sums]
    assert {"kl", "ratio", "loss", "entropy_weight"} <= whole.keys()
    assert cut == [pytest.approx(whole, rel=1e-5, abs=1e-8)] * 2


def test_policy_loss_of_the_tokens_with_the_highest_entropy(model, trajectory):
    """Against logits in full: the mean over 5 of 16 positions of a context, the same in all of its completions."""
    objective = Objective(clip_range=0.2, entropy_token_share=0.3)
    (ours,) = gradients(model, trajectory, micro_batch=3, objective=objective)
    log_probs = model(trajectory.context, trajectory.condition).log_softmax(dim=-1)  # [B, T, V]
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    chosen = (entropy >= entropy.sort(dim=-1, descending=True).values[:, 4:5]).float()[:, None]  # [B, 1, T]
    assert chosen.sum() == 5 * B
    new = log_probs[:, None].expand(-1, G, -1, -1).gather(-1, trajectory.tokens[..., None])[..., 0]  # [B, G, T]
    surrogate = -trajectory.advantages[..., None] * (new - new.detach()).exp()
    theirs = torch.autograd.grad((chosen * surrogate).sum() / (5 * B * G), list(model.parameters()))
    assert relative_difference(ours, theirs) < 1e-5


def test_epochs_go_through_the_same_steps_in_the_same_order(model, trajectory):
    """Old log-probs are scored once, before the first step; the weights stay as they are here."""
    objective = Objective(clip_range=0.2, aux_ce_weight=0.1)
    once = gradients(model, trajectory, micro_batch=3, step=B * G // 2, objective=objective)
    forwards = count_forwards(model)
    update = make_update(model, micro_batch=3, step=B * G // 2, objective=objective, epochs=3)
    assert (update.schedule.steps_per_rollout, update.schedule.on_policy) == (6, False)
    update(trajectory)
    assert len(forwards) == math.ceil(B / 3) + 3 * 2 * math.ceil(B / 2 / 3)
    for taken, expected in zip(update.optimizer.gradients, once * 3, strict=True):
        assert relative_difference(taken, expected) == 0


def test_parts_of_a_rollout_add_up_to_one_step(model, trajectory):
    """A teacher-forced rollout may come in parts, each with scores of its own."""
    objective = Objective(clip_range=0.2, kl="k3", aux_ce_weight=0.1)
    (whole,) = gradients(model, trajectory, micro_batch=B * G, objective=objective)
    update = make_update(model, micro_batch=2, objective=objective)
    assert update.schedule.trains_sampling_forward
    forwards = count_forwards(model)
    for part in trajectory.split(1):
        update(replace(part, scores=score(model, part, draw=Draw())))
    assert relative_difference(update.optimizer.gradients[0], whole) < 1e-5
    assert len(forwards) == B  # those of the parts; the update had none of its own


@pytest.mark.parametrize(("micro_batch", "step", "steps"), [(2, 2, 12), (3, 6, 4), (6, 12, 2)])
def test_several_optimizer_steps_of_a_rollout(model, trajectory, micro_batch, step, steps):
    """Weights stay as they are here, so the steps' gradients average to that of the whole rollout."""
    objective = Objective(clip_range=0.2, aux_ce_weight=0.1)
    (whole,) = gradients(model, trajectory, micro_batch=B * G, objective=objective)
    several = gradients(model, trajectory, micro_batch=micro_batch, step=step, objective=objective)
    assert len(several) == steps
    mean = [torch.stack(tensors).mean(dim=0) for tensors in zip(*several, strict=True)]
    assert relative_difference(mean, whole) < 1e-5


def test_real_images_beside_autoregressive_completions(model, trajectory):
    """Rows without completions add exactly aux_ce_weight times the mean cross-entropy on their codes."""
    tokens = trajectory.tokens.flatten(0, 1)
    completions = Trajectory(
        condition=trajectory.condition.repeat_interleave(G),
        context=tokens[:, :-1],
        tokens=tokens[:, None],
        old_log_probs=trajectory.old_log_probs.flatten(0, 1)[:, None],
        advantages=trajectory.advantages.flatten()[:, None],
        real=real_rows(trajectory.condition, trajectory.target_tokens),
    )
    arguments = {"micro_batch": 4, "mode": "autoregressive"}
    (without,) = gradients(model, completions, objective=Objective(aux_ce_weight=0.0), **arguments)
    (with_real,) = gradients(model, completions, objective=Objective(aux_ce_weight=0.3), **arguments)
    logits = model(trajectory.context, trajectory.condition)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), trajectory.target_tokens.flatten())
    expected = torch.autograd.grad(0.3 * cross_entropy, list(model.parameters()))
    added = [a - b for a, b in zip(with_real, without, strict=True)]
    assert relative_difference(added, expected) < 1e-5


def test_token_dropout_keeps_the_stated_share(model, trajectory):
    objective = Objective(use_token_dropout=True, token_dropout=0.75)
    update = make_update(model, micro_batch=B * G, objective=objective)
    many = replace(trajectory, completion_ids=torch.arange(B * G).view(B, G) * 1000)
    keep, probability = update._kept_tokens(many, torch.zeros(B, T))
    assert probability == 0.25
    assert keep.shape == (B, G, T)
    assert keep.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert keep.any(dim=-1).all()


@pytest.mark.parametrize("mode", ["teacher_forced", "autoregressive"])
def test_nothing_waits_for_the_device_before_the_optimizer_step(mode):
    """Rollout, advantages and update on tensors without values: whoever asks for one fails."""
    rollout = {"mode": mode, "top_k": 8, "importance_weight_cap": 1.0}
    objective = Objective(aux_ce_weight=0.1, entropy_weight=0.01, use_token_dropout=True)
    with FakeTensorMode():
        model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=V, block_size=T, num_classes=5)).eval()
        micro_batch = 2 if mode == "teacher_forced" else B * G
        update = make_update(model, micro_batch=micro_batch, objective=objective, **rollout)
        codes = torch.zeros(B, T, dtype=torch.int64)
        sample = build_rollout(
            model, lambda batch: codes[: batch.rows], update.rollout,
            draw=Draw(top_k=8), schedule=update.schedule,
        )  # fmt: skip
        ids = torch.zeros(B, dtype=torch.int64)
        batch = ImageBatch(torch.zeros(B, 0), ClassCondition(ids), ids, ids)
        for part in batch.parts(update.schedule.images_per_part):
            trajectory = sample(part)
            rewards = torch.zeros(part.rows, G)
            trajectory.advantages = group_advantages(rewards).view(trajectory.tokens.shape[:2])
            update(trajectory)
        assert len(update.optimizer.gradients) == 1
