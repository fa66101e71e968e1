"""Log-probs of given tokens under given contexts: the one definition for old, new and reference policies."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo.kernels import Draw, Dropout, linear_token_log_probs
from grpo.models import Condition, Generator, WithoutAdapter
from grpo.rollout.trajectory import Scores, Trajectory


def guide(hidden: Tensor, scale: float) -> Tensor:
    """Final hidden states [2R, ...], conditional rows followed by unconditional ones -> [R, ...] guided.

    The output projection is linear without bias, so guiding hidden states h_u + s (h_c - h_u) and projecting once
    equals guiding the logits (Ho & Salimans, arXiv 2207.12598).
    """
    conditional, unconditional = hidden.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def hidden_states(
    model: Generator | WithoutAdapter,
    context: Tensor,
    condition: Condition,
    dropout: Dropout | None = None,
    *,
    cfg_scale: float = 1.0,
) -> Tensor:
    """Final hidden states [R, T, D] of contexts [R, T-1], guided where `cfg_scale` is not 1."""
    if cfg_scale == 1.0:
        return model.hidden(context, condition, dropout)
    # a row and its unconditional counterpart drop the same: their difference is not noise
    both, dropout = condition.with_unconditional(), dropout and dropout.repeat(2)
    return guide(model.hidden(context.repeat(2, 1), both, dropout), cfg_scale)


def score(model: Generator | WithoutAdapter, trajectory: Trajectory, *, draw: Draw, cfg_scale: float = 1.0) -> Scores:
    """Score a trajectory's completions and targets with one forward per context.

    Args:
        trajectory: its `scores`, if any, are not used; where it `drops`, the model has its dropouts, by row ids.
        draw: the distribution that scores the completions; the targets are always scored at temperature 1.
        cfg_scale: guidance of that distribution.

    Raises:
        ValueError: targets together with guidance (they have no common hidden state).
    """
    rows, completions, length = trajectory.tokens.shape
    targets = trajectory.target_tokens
    if targets is not None and completions and cfg_scale != 1.0:
        raise ValueError("targets are scored without guidance: give them rows of their own")
    if completions == 0:
        draw, cfg_scale = replace(draw, temperature=1.0), 1.0
    dropout = None
    if trajectory.drops:
        assert trajectory.row_ids is not None, "the keys of the masks"
        dropout = Dropout(trajectory.row_ids, seed=draw.seed, impl=draw.impl)
    hidden = hidden_states(model, trajectory.context, trajectory.condition, dropout, cfg_scale=cfg_scale)
    hidden = hidden.flatten(0, 1)  # [R*T, D]
    tokens = trajectory.tokens.transpose(1, 2)  # [R, T, M]
    shared = targets if draw.temperature == 1.0 else None  # scored under the same distribution
    if shared is not None:
        tokens = torch.cat([tokens, shared[..., None]], dim=-1)
    log_probs, entropy = draw.score(hidden, model.output.weight, tokens.flatten(0, 1))
    log_probs = log_probs.view(rows, length, -1).transpose(1, 2)  # [R, M (+1), T]
    target_log_probs = None
    if shared is not None:
        target_log_probs, log_probs = log_probs[:, -1], log_probs[:, :-1]
    elif targets is not None:
        target_log_probs = score_targets(model, hidden, targets, draw=draw)
    return Scores(log_probs, entropy.view(rows, length), target_log_probs)


def score_targets(model: Generator | WithoutAdapter, hidden: Tensor, targets: Tensor, *, draw: Draw) -> Tensor:
    """Log-probs [R, T] of the targets [R, T] under hidden states [R*T, D], at temperature 1."""
    log_probs = linear_token_log_probs(hidden, model.output.weight, targets.reshape(-1, 1), impl=draw.impl)
    return log_probs.view(targets.shape)
