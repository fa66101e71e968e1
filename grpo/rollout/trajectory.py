"""What a rollout yields and an update consumes."""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from grpo.models import Condition


class Scores(NamedTuple):
    """What the loss needs of a policy, all fp32 and with gradient where the model has one."""

    log_probs: Tensor  # [R, M, T] of the completions, under the tempered (and guided) distribution
    entropy: Tensor  # [R, T] of that distribution, nats
    target_log_probs: Tensor | None  # [R, T] of the real image's codes, at temperature 1 and without guidance

    def select(self, rows: slice, completions: slice) -> "Scores":
        """The given rows and, of each, the given completions."""
        targets = self.target_log_probs
        return Scores(self.log_probs[rows, completions], self.entropy[rows], None if targets is None else targets[rows])


PER_ROW = ("context", "target_tokens", "row_ids")  # all other tensors of a trajectory are [R, M, ...]


@dataclass
class Trajectory:
    """M completions of T tokens under each of R contexts (the rows of one forward).

    Teacher forcing: a row is a real image, R = B and M = G: its completions share one forward and one backward.
    Autoregressive: a row is a completion, R = B * G in groups of G, and M = 1. A row may also have no completion
    (M = 0) and only `target_tokens`: real images for the auxiliary cross-entropy. No later stage needs to know which.
    """

    condition: Condition  # R rows: what each context row was asked for
    context: Tensor  # [R, T-1] int64: the tokens fed to the model
    tokens: Tensor  # [R, M, T] int64: the completions scored under that context
    old_log_probs: Tensor  # [R, M, T] fp32: of the full tempered distribution of the policy that sampled
    ref_log_probs: Tensor | None = None  # [R, M, T] fp32: under the frozen reference
    target_tokens: Tensor | None = None  # [R, T] int64: the codes of the real image, for the auxiliary cross-entropy
    rewards: Tensor | None = None  # [R, M] fp32
    advantages: Tensor | None = None  # [R, M] fp32
    kept_mass: Tensor | None = None  # [R, M, T] fp32: probability of what top-k and top-p left; None if that is all
    row_ids: Tensor | None = None  # [R] int64: numbers of the rows over the whole run, the keys of dropout's masks
    drops: bool = False  # whether its log-probs and losses are those of a forward with dropout
    completion_ids: Tensor | None = None  # [R, M] int64: global running numbers, the keys of the random numbers
    scores: Scores | None = None  # with their graph, when the forward that sampled is also the one to train
    real: "Trajectory | None" = None  # rows with targets alone, when no row of this trajectory has a target

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
        changes: dict[str, Any] = {"real": None, "condition": self.condition.select(rows), "scores": scores}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = value[rows] if item.name in PER_ROW else value[rows, completions]
        return replace(self, **changes)

    def split(self, rows: int) -> list["Trajectory"]:
        """Micro-batches of at most `rows` rows."""
        return [self.select(slice(start, start + rows)) for start in range(0, self.rows, rows)]


def real_rows(condition: Condition, codes: Tensor, *, row_ids: Tensor | None = None) -> Trajectory:
    """Real images as rows without completions: their codes [B, T] are context and target."""
    empty = codes.new_zeros(codes.shape[0], 0, codes.shape[1])
    return Trajectory(
        condition,
        context=codes[:, :-1],
        tokens=empty,
        old_log_probs=empty.float(),
        target_tokens=codes,
        advantages=empty[..., 0].float(),
        row_ids=row_ids,
    )
