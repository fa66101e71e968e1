"""What a rollout yields and an update consumes."""

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from torch import Tensor

from grpo.models import Condition


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


PER_COMPLETION = {"per_completion": True}  # metadata of fields whose first two dimensions are [R, M]


@dataclass
class Trajectory:
    """M completions of T tokens under each of R contexts (the rows of one forward).

    Teacher forcing: a row is a real image, R = B and M = G: its completions share one forward and one backward.
    Autoregressive: a row is a completion, R = B * G in groups of G, and M = 1. A row may also have no completion
    (M = 0) and only `target_tokens`: real images for the auxiliary cross-entropy. No later stage needs to know which.
    """

    condition: Condition
    """R rows: what each context row was asked for."""
    context: Tensor
    """[R, T-1] int64: the tokens fed to the model."""
    tokens: Tensor = field(metadata=PER_COMPLETION)
    """[R, M, T] int64: the completions scored under that context."""
    old_log_probs: Tensor = field(metadata=PER_COMPLETION)
    """[R, M, T] fp32: under the policy that sampled, of the full tempered distribution."""
    ref_log_probs: Tensor | None = field(default=None, metadata=PER_COMPLETION)
    """[R, M, T] fp32: under the frozen reference."""
    target_tokens: Tensor | None = None
    """[R, T] int64: the codes of the real image, for the auxiliary cross-entropy."""
    rewards: Tensor | None = field(default=None, metadata=PER_COMPLETION)
    """[R, M] fp32."""
    advantages: Tensor | None = field(default=None, metadata=PER_COMPLETION)
    """[R, M] fp32."""
    kept_mass: Tensor | None = field(default=None, metadata=PER_COMPLETION)
    """[R, M, T] fp32: probability of the set that top-k and top-p left to draw from; None without truncation."""
    completion_ids: Tensor | None = field(default=None, metadata=PER_COMPLETION)
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
    def num_completions(self) -> int:
        """R * M."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    def select(self, rows: slice, completions: slice = slice(None)) -> "Trajectory":
        """The given rows and, of each, the given completions, without `real`; views, not copies."""
        scores = None if self.scores is None else self.scores.select(rows, completions)
        changes = {"real": None, "condition": self.condition.select(rows), "scores": scores}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = value[rows, completions] if item.metadata else value[rows]
        return replace(self, **changes)

    def split(self, rows: int) -> list["Trajectory"]:
        """Micro-batches of at most `rows` rows."""
        return [self.select(slice(start, start + rows)) for start in range(0, self.rows, rows)]


def real_rows(condition: Condition, codes: Tensor) -> Trajectory:
    """Real images as rows without completions: their codes [B, T] are context and target."""
    empty = codes.new_zeros(codes.shape[0], 0, codes.shape[1])
    return Trajectory(
        condition, codes[:, :-1], empty, empty.float(), target_tokens=codes, advantages=empty[..., 0].float()
    )
