"""The algorithm that this project replaces, written plainly: the baseline of bench_update.py.

One step as the reference trainer does it (VA-π's train_c2i_grpo.py): logits of the teacher-forced forward in full; each
completion redoes softmax and draw over the whole vocabulary; the update runs the GPT once per completion, on copies of
the context, in micro-batches of completions, and takes the log-softmax of logits in full.
"""

import torch
from torch import Tensor, nn

from grpo.models import ClassCondition, Condition
from grpo.rollout import Trajectory
from llamagen_filter import filtered


@torch.no_grad()
def sample(model: nn.Module, condition: Condition, codes: Tensor, *, num_generations: int) -> Trajectory:
    """B conditions and codes [B, T] -> Trajectory with R = B rows and M = G completions, without advantages."""
    logits = model(codes[:, :-1], condition).float()  # [B, T, V]
    flat = logits.flatten(0, 1)
    tokens, log_probs = [], []
    for _ in range(num_generations):
        distribution = torch.log_softmax(flat, dim=-1)
        drawn = torch.multinomial(torch.softmax(flat, dim=-1), num_samples=1)
        tokens.append(drawn.view(codes.shape))
        log_probs.append(distribution.gather(1, drawn).view(codes.shape))
    return Trajectory(
        condition=condition,
        context=codes[:, :-1],
        tokens=torch.stack(tokens, dim=1),
        old_log_probs=torch.stack(log_probs, dim=1),
        target_tokens=codes,
    )


def update(model: nn.Module, trajectory: Trajectory, *, batch_size: int, clip: float, aux_ce_weight: float) -> None:
    """Add the gradient of one optimizer step, `batch_size` completions at a time."""
    rows, completions, _ = trajectory.tokens.shape

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(completions, dim=0)

    condition, context = trajectory.condition.repeat_interleave(completions), repeated(trajectory.context)
    targets = repeated(trajectory.target_tokens)
    tokens, old = trajectory.tokens.flatten(0, 1), trajectory.old_log_probs.flatten(0, 1)
    advantages = trajectory.advantages.flatten()[:, None]
    for start in range(0, rows * completions, batch_size):
        part = slice(start, start + batch_size)
        logits = model(context[part], condition.select(part)).float()
        log_probs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[part][..., None])[..., 0]
        ratio = torch.exp(log_probs - old[part])
        surrogate = torch.maximum(-advantages[part] * ratio, -advantages[part] * ratio.clamp(1 - clip, 1 + clip))
        cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), targets[part].flatten())
        loss = surrogate.mean(dim=1).mean() + aux_ce_weight * cross_entropy
        (loss * len(ratio) / (rows * completions)).backward()


@torch.no_grad()
def generate(
    model: nn.Module, class_ids: Tensor, *, cfg_scale: float, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Codes [B, T] as LlamaGen's own sampler draws them.

    Two sets of logits combined by guidance, filters by a sort of every row, softmax and multinomial, one Python step a
    token; the cache is read in full.
    """
    length = model.config.block_size
    condition = ClassCondition(class_ids).with_unconditional()
    dtype, device = model.output.weight.dtype, class_ids.device
    cache = model.init_cache(condition.rows, dtype=dtype, device=device)
    tokens: list[Tensor] = []
    for position in range(length):
        if position == 0:
            hidden = model.prefill(condition, cache)
        else:
            hidden = model.extend(tokens[-1].repeat(2), torch.tensor(position, device=device), cache)
        conditional, unconditional = model.output(hidden).float().chunk(2)
        logits = filtered((unconditional + cfg_scale * (conditional - unconditional)) / temperature, top_k, top_p)
        tokens.append(torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)[:, 0])
    return torch.stack(tokens, dim=1)
