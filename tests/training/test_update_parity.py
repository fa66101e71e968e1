"""The policy update against LlamaGen's own numbers: one GRPO step with four settings, gradients included."""

import json
from pathlib import Path

import pytest
import torch

from grpo.config import Objective, Rollout, Schedule
from grpo.kernels import Draw
from grpo.models import ClassCondition, GPTConfig, load_gpt
from grpo.objectives import group_advantages
from grpo.rollout import Trajectory
from grpo.training import PolicyUpdate

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "llamagen"


class Gradients:
    """Stands in for the optimizer: collects gradients, never steps."""

    def __init__(self):
        self.loss = 0.0

    def backward(self, loss):
        self.loss += loss.item()
        loss.backward()

    def step(self):
        return {}


@pytest.fixture(scope="module")
def step():
    return torch.load(FIXTURES / "grpo_step.pt", weights_only=True)


@pytest.mark.parametrize("micro_batch", [24, 1])
@pytest.mark.parametrize("case", range(4))
def test_loss_and_gradients(step, case, micro_batch):
    clip_range, advantage_clip, kl_coef, aux_ce_weight = step[f"case{case}_params"].tolist()
    policy = load_gpt(FIXTURES / "gpt_c2i.pt", GPTConfig(**json.loads((FIXTURES / "config.json").read_text())["gpt"]))
    policy.load_state_dict(step["new_state_dict"])
    policy.requires_grad_(True)
    gradients = Gradients()
    update = PolicyUpdate(
        policy,
        gradients,
        rollout=Rollout(),
        draw=Draw(temperature=float(step["temperature"])),
        # Twice as many completions a rollout as an optimizer step takes: old log-probs are then not the new ones.
        schedule=Schedule(
            ranks=1,
            images=8,
            group_size=6,
            completions_per_step=24,
            micro_batch_size=micro_batch,
            trains_sampling_forward=False,
            scores_targets=aux_ce_weight > 0,
        ),
        objective=Objective(
            clip_range=clip_range, kl="k3", kl_coef=kl_coef, advantage_clip=advantage_clip, aux_ce_weight=aux_ce_weight
        ),
    )
    trajectory = Trajectory(
        condition=ClassCondition(step["class_ids"]),
        context=step["context"],
        tokens=step["actions"],
        old_log_probs=step["old_log_probs"],
        ref_log_probs=step["ref_log_probs"],
        target_tokens=step["tokens"],
        advantages=group_advantages(step["rewards"], clip=advantage_clip),
    )
    torch.testing.assert_close(update.score(policy, trajectory), step["new_log_probs"], rtol=1e-5, atol=1e-5)
    update.score = lambda model, trajectory: trajectory.old_log_probs  # they are given
    metrics = update(trajectory)

    assert gradients.loss == pytest.approx(step[f"case{case}_loss"].item(), rel=2e-5)
    assert metrics.means()["kl"] == pytest.approx(step[f"case{case}_kl"].item(), rel=2e-5)
    named = dict(policy.named_parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in named.values()])
    assert norm.item() == pytest.approx(step[f"case{case}_grad_norm"].item(), rel=2e-5)
    for name in ("output.weight", "layers.0.attention.wqkv.weight"):
        torch.testing.assert_close(named[name].grad, step[f"case{case}_grad.{name}"], rtol=1e-4, atol=1e-6)


def test_advantages(step):
    torch.testing.assert_close(group_advantages(step["rewards"]), step["advantages"])
