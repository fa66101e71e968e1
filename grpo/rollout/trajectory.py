"""What a rollout yields and an update consumes."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What the loss needs of a policy, all fp32 and with gradient where the model has one."""

    log_probs: Tensor
    """[R, M, T] of the completions, under the tempered (and guided) distribution."""
    entropy: Tensor
    """[R, T] of that distribution, nats."""
    target_log_probs: Tensor | None
    """[R, T] of the real image's codes, at temperature 1 and without guidance."""

    def select(self, rows: slice, completions: slice) -> "Scores":
        """The given rows and, of each, the given completions."""
        targets = self.target_log_probs
        return Scores(self.log_probs[rows, completions], self.entropy[rows], None if targets is None else targets[rows])


@dataclass
class Trajectory:
    """M completions of T tokens under each of R contexts (the rows of one forward).

    Teacher forcing: a row is a real image, R = B and M = G: its completions share one forward and one backward.
    Autoregressive: a row is a completion, R = B * G in groups of G, and M = 1. A row may also have no completion
    (M = 0) and only `target_tokens`: real images for the auxiliary cross-entropy. No later stage needs to know which.
    """

    class_ids: Tensor
    """[R] int64: the condition of each context."""
    context: Tensor
    """[R, T-1] int64: the tokens fed to the GPT."""
    tokens: Tensor
    """[R, M, T] int64: the completions scored under that context."""
    old_log_probs: Tensor
    """[R, M, T] fp32: under the policy that sampled, of the full tempered distribution."""
    ref_log_probs: Tensor | None = None
    """[R, M, T] fp32: under the frozen reference."""
    target_tokens: Tensor | None = None
    """[R, T] int64: the codes of the real image, for the auxiliary cross-entropy."""
    rewards: Tensor | None = None
    """[R, M] fp32."""
    advantages: Tensor | None = None
    """[R, M] fp32."""
    kept_mass: Tensor | None = None
    """[R, M, T] fp32: probability of the set that top-k and top-p left to draw from; None without truncation."""
    completion_ids: Tensor | None = None
    """[R, M] int64: global running numbers of the completions, the keys of their random numbers."""
    scores: Scores | None = None
    """Scores of the completions with their graph, when the forward that sampled is also the one to train."""
    real: "Trajectory | None" = None
    """Rows without completions for the auxiliary cross-entropy, when no row of this trajectory has a target."""

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens.shape[0]

    @property
    def completions(self) -> int:
        """R * M."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    def select(self, rows: slice, completions: slice = slice(None)) -> "Trajectory":
        """The given rows and, of each, the given completions, without `real`; views, not copies."""
        changes = {"real": None}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "real":
                continue
            if field.name == "scores":
                changes["scores"] = value.select(rows, completions)
                continue
            per_completion = field.name in _PER_COMPLETION
            changes[field.name] = value[rows, completions] if per_completion else value[rows]
        return replace(self, **changes)

    def split(self, rows: int) -> list["Trajectory"]:
        """Micro-batches of at most `rows` rows."""
        return [self.select(slice(start, start + rows)) for start in range(0, self.rows, rows)]


_PER_COMPLETION = {
    "tokens", "old_log_probs", "ref_log_probs", "rewards", "advantages", "kept_mass", "completion_ids",
}  # fmt: skip


def real_rows(class_ids: Tensor, codes: Tensor) -> Trajectory:
    """Real images as rows without completions: their codes [B, T] are context and target."""
    empty = codes.new_zeros(codes.shape[0], 0, codes.shape[1])
    return Trajectory(
        class_ids=class_ids,
        context=codes[:, :-1],
        tokens=empty,
        old_log_probs=empty.float(),
        target_tokens=codes,
        advantages=empty.new_zeros(empty.shape[:2], dtype=torch.float32),
    )
