"""Log-probs of given tokens under given contexts: the one definition for old, new and reference policies."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from grpo.kernels import Draw, Dropout, linear_token_log_probs
from grpo.rollout.trajectory import Scores, Trajectory


def guide(hidden: Tensor, scale: float) -> Tensor:
    """Final hidden states [2R, ...], conditional rows followed by unconditional ones -> [R, ...] guided.

    The output projection is linear without bias, so guiding hidden states h_u + s (h_c - h_u) and projecting once
    equals guiding the logits (Ho & Salimans, arXiv 2207.12598).
    """
    conditional, unconditional = hidden.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def score(model: nn.Module, trajectory: Trajectory, *, draw: Draw, cfg_scale: float = 1.0) -> Scores:
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
    dropout = Dropout(trajectory.row_ids, seed=draw.seed, impl=draw.impl) if trajectory.drops else None
    if cfg_scale == 1.0:
        hidden = model.hidden(trajectory.context, trajectory.condition, dropout)  # [R, T, D]
    else:  # a row and its unconditional counterpart drop the same: their difference is not noise
        condition, dropout = trajectory.condition.with_unconditional(), dropout and dropout.repeat(2)
        hidden = guide(model.hidden(trajectory.context.repeat(2, 1), condition, dropout), cfg_scale)
    hidden = hidden.flatten(0, 1)  # [R*T, D]
    tokens = trajectory.tokens.transpose(1, 2)  # [R, T, M]
    shared = targets is not None and draw.temperature == 1.0
    if shared:
        tokens = torch.cat([tokens, targets[..., None]], dim=-1)
    log_probs, entropy = draw.score(hidden, model.output.weight, tokens.flatten(0, 1))
    log_probs = log_probs.view(rows, length, -1).transpose(1, 2)  # [R, M (+1), T]
    target_log_probs = None
    if shared:
        target_log_probs, log_probs = log_probs[:, -1], log_probs[:, :-1]
    elif targets is not None:
        target_log_probs = score_targets(model, hidden, targets, draw=draw)
    return Scores(log_probs, entropy.view(rows, length), target_log_probs)


def score_targets(model: nn.Module, hidden: Tensor, targets: Tensor, *, draw: Draw) -> Tensor:
    """Log-probs [R, T] of the targets [R, T] under hidden states [R*T, D], at temperature 1."""
    log_probs = linear_token_log_probs(hidden, model.output.weight, targets.reshape(-1, 1), impl=draw.impl)
    return log_probs.view(targets.shape)
