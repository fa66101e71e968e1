"""Draws from a projection of hidden states, with their differentiable log-probs; the settings of a draw as one value.

The gradient needs the logits again. Where they come from is chosen once, by `_keeps_logits`: they are kept from the
forward pass (three matrix products in all) or computed again in chunks (four).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo.kernels.log_probs import chunk_kind_of, linear_token_log_probs
from grpo.kernels.projection import KEPT_ELEMENTS, project_logits, projection_chunks
from grpo.kernels.row_math import ScoredRows
from grpo.kernels.sampling import Sample, sample_tokens

_KEPT_ELEMENTS = {"cpu": 1 << 24, **KEPT_ELEMENTS}  # see `_keeps_logits`


class ScoredSample(NamedTuple):
    """Result of `sample_and_score`; log-probs and entropy have gradients."""

    tokens: Tensor
    """[N, num_samples] int64."""
    log_probs: Tensor
    """[N, num_samples] fp32, of the full tempered distribution."""
    kept_mass: Tensor
    """[N] fp32, probability of the set that top-k and top-p left to draw from."""
    entropy: Tensor
    """[N] fp32 of the full tempered distribution, nats."""
    target_log_probs: Tensor | None
    """[N] fp32 of the targets under that distribution, None without targets."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One distribution over the vocabulary for each row of logits, and the random numbers that draw from it.

    The fields are arguments of `sample_tokens`, and documented there.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    impl: str = "auto"

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be left out of the draw."""
        return self.top_k > 0 or self.top_p < 1.0

    def sample(self, logits: Tensor, *, row_ids: Tensor, num_samples: int = 1) -> Sample:
        """Tokens from logits [N, V]; see `sample_tokens`."""
        return sample_tokens(logits, row_ids=row_ids, num_samples=num_samples, **asdict(self))

    def sample_projection(self, hidden: Tensor, weight: Tensor, **rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens from logits hidden [N, D] @ weight.T [D, V], without gradient; see `sample_projection`."""
        return sample_projection(hidden, weight, **rows, **asdict(self))

    def sample_and_score(self, hidden: Tensor, weight: Tensor, **rows: Any) -> ScoredSample:
        """The same with differentiable log-probs of what is drawn and of `targets`; see `sample_and_score`."""
        return sample_and_score(hidden, weight, **rows, **asdict(self))

    def score(self, hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [N, M] of tokens [N, M] and entropy [N], of the full tempered distribution, with gradient.

        See `linear_token_log_probs`. Truncation shapes what is drawn, not what it is scored by.
        """
        return linear_token_log_probs(
            hidden, weight, tokens, temperature=self.temperature, return_entropy=True, impl=self.impl
        )


def sample_projection(
    hidden: Tensor, weight: Tensor, *, row_ids: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, log_probs [N, num_samples] and kept_mass [N] of `sample_tokens` for a projection, without gradients.

    `hidden`, `weight` and `row_ids` are those of `sample_and_score`, `settings` the other arguments of `sample_tokens`.
    """
    parts = []
    for rows in projection_chunks(hidden, weight):
        sample = sample_tokens(project_logits(hidden[rows], weight), row_ids=row_ids[rows], **settings)
        parts.append((sample.tokens, sample.log_probs, sample.kept_mass))
    tokens, log_probs, kept_mass = _joined(parts)
    return tokens, log_probs, kept_mass


def sample_and_score(
    hidden: Tensor, weight: Tensor, *, num_samples: int, seed: int, row_ids: Tensor, targets: Tensor | None = None,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, impl: str = "auto",
) -> ScoredSample:  # fmt: skip
    """`sample_tokens` of softmax(hidden @ weight.T / temperature) and `linear_token_log_probs` of what it draws.

    The logits of a chunk are computed once for both. The backward pass takes those of the forward pass, and uses them
    up, where they fit into 64 MB on a CPU or `KEPT_ELEMENTS` on a GPU; else it computes them again.

    `hidden` is [N, D], `weight` [V, D]; `targets` [N] int64 are given tokens to be scored as well. For `row_ids` [N]
    int64 and the settings see `sample_tokens`.
    """
    draw = Draw(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, impl=impl)
    tokens, log_probs, kept_mass, entropy = _SampleAndScore.apply(hidden, weight, targets, row_ids, num_samples, draw)
    target_log_probs = None if targets is None else log_probs[:, num_samples]
    return ScoredSample(tokens, log_probs[:, :num_samples], kept_mass, entropy, target_log_probs)


class _SampleAndScore(torch.autograd.Function):
    """Log-probs come with those of the targets as a last column."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, row_ids, num_samples, draw):
        ctx.draw, ctx.kept = draw, [] if _keeps_logits(hidden, weight) else None
        parts = []
        for rows in projection_chunks(hidden, weight):
            logits = project_logits(hidden[rows], weight)
            sample = draw.sample(logits, row_ids=row_ids[rows], num_samples=num_samples)
            scored = sample.tokens if targets is None else torch.cat([sample.tokens, targets[rows, None]], dim=1)
            scores = torch.ops.grpo.token_log_probs(logits, scored, draw.temperature, True, draw.impl)
            parts.append((sample.tokens, sample.kept_mass, scored, *scores))
            if ctx.kept is not None:
                ctx.kept.append((rows, logits))
            del logits  # before the next chunk is computed, or there would be two
        tokens, kept_mass, scored, log_probs, lse, entropy = _joined(parts)
        ctx.save_for_backward(hidden, weight, scored, lse, entropy)
        ctx.mark_non_differentiable(tokens, kept_mass)
        ctx.set_materialize_grads(False)
        return tokens, log_probs, kept_mass, entropy

    @staticmethod
    def backward(ctx, _, grad_log_probs, __, grad_entropy):
        hidden, weight, *saved = ctx.saved_tensors
        scored = ScoredRows.of(saved, grad_log_probs, grad_entropy)
        needs, temperature = ctx.needs_input_grad[:2], ctx.draw.temperature
        kept, ctx.kept = ctx.kept, None  # the first backward pass uses them up
        if kept is None:
            gradients = torch.ops.grpo.linear_token_log_probs_backward(
                *scored[3:], hidden, weight, *scored[:3], None, temperature, *needs, ctx.draw.impl
            )
        else:
            chunks = chunk_kind_of(hidden, weight, ctx.draw.impl)(hidden, weight, temperature, needs)
            with torch.cuda.device_of(hidden):
                for rows, logits in kept:
                    chunks.backward(rows, chunks.tempered(logits), scored)
            gradients = chunks.gradients()
        return *gradients, None, None, None, None


def _keeps_logits(hidden: Tensor, weight: Tensor) -> bool:
    """The one place that decides whether logits outlive the forward pass.

    A CPU keeps 64 MB at most: another product costs it more than reading them. A GPU keeps up to 2.1 GB, a small part
    of what the blocks of a model with as many rows keep: more of [N, V] is what it has no memory for.
    """
    return len(hidden) * len(weight) <= _KEPT_ELEMENTS.get(hidden.device.type, 0)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The columns of all chunks."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
