"""Log-probs of given tokens under given contexts: the one definition for old, new and reference policies."""

import torch
from torch import Tensor, nn

from grpo.kernels import linear_token_log_probs
from grpo.rollout.trajectory import Scores, Trajectory


def guided_hidden(model: nn.Module, context: Tensor, class_ids: Tensor, scale: float) -> Tensor:
    """Final hidden states [R, T, D], with classifier-free guidance when `scale` is not 1.

    The output projection is linear without bias, so guiding hidden states h_u + s (h_c - h_u) and projecting once
    equals guiding the logits (Ho & Salimans, arXiv 2207.12598).
    """
    if scale == 1.0:
        return model.hidden(context, class_ids)
    unconditional = torch.full_like(class_ids, model.config.num_classes)
    both = model.hidden(context.repeat(2, 1), torch.cat([class_ids, unconditional]))
    return guide(both, scale)


def guide(hidden: Tensor, scale: float) -> Tensor:
    """[2R, ...] conditional rows followed by unconditional ones -> [R, ...] guided."""
    conditional, unconditional = hidden.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def score(
    model: nn.Module, trajectory: Trajectory, *, temperature: float, cfg_scale: float = 1.0, impl: str = "auto"
) -> Scores:
    """Score a trajectory's completions and targets with one forward per context.

    Args:
        model: a GPT (its `hidden` and `output`).
        trajectory: its `scores`, if any, are not used.
        temperature: divides the logits of the completions; the targets are always scored at 1.
        cfg_scale: guidance of the distribution that scores the completions.
        impl: backend of the log-prob operation.

    Raises:
        ValueError: targets together with guidance (they have no common hidden state).
    """
    rows, completions, length = trajectory.tokens.shape
    targets = trajectory.target_tokens
    if targets is not None and completions and cfg_scale != 1.0:
        raise ValueError("targets are scored without guidance: give them rows of their own")
    if completions == 0:
        cfg_scale = temperature = 1.0
    hidden = guided_hidden(model, trajectory.context, trajectory.class_ids, cfg_scale)
    flat = hidden.flatten(0, 1)  # [R*T, D]
    tokens = trajectory.tokens.transpose(1, 2)  # [R, T, M]
    shared = targets is not None and temperature == 1.0
    if shared:
        tokens = torch.cat([tokens, targets[..., None]], dim=-1)
    weight = model.output.weight
    log_probs, entropy = linear_token_log_probs(
        flat, weight, tokens.flatten(0, 1), temperature=temperature, return_entropy=True, impl=impl
    )
    log_probs = log_probs.view(rows, length, -1).transpose(1, 2)  # [R, M (+1), T]
    target_log_probs = None
    if shared:
        target_log_probs, log_probs = log_probs[:, -1], log_probs[:, :-1]
    elif targets is not None:
        target_log_probs = linear_token_log_probs(flat, weight, targets.reshape(-1, 1), impl=impl).view(rows, length)
    return Scores(log_probs, entropy.view(rows, length), target_log_probs)
