"""How tokens are drawn from logits: the settings that travel from a recipe to the kernels as one value."""

from dataclasses import asdict, dataclass

from torch import Tensor

from grpo.kernels.linear_log_probs import linear_token_log_probs
from grpo.kernels.sample_and_score import ScoredSample, sample_and_score, sample_projection
from grpo.kernels.sampling import Sample, sample_tokens


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One distribution over the vocabulary for each row of logits, and the random numbers that draw from it.

    Args:
        temperature: divides the logits.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the smallest set whose probability exceeds p; 1 keeps all.
        seed: of the counter-based generator, see `philox.py`.
        impl: backend of the operations: "auto", "triton" or "reference".
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

    def sample_projection(
        self, hidden: Tensor, weight: Tensor, *, row_ids: Tensor, num_samples: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens from logits hidden [N, D] @ weight.T [D, V], without gradient; see `sample_projection`."""
        return sample_projection(hidden, weight, row_ids=row_ids, num_samples=num_samples, **asdict(self))

    def sample_and_score(
        self, hidden: Tensor, weight: Tensor, *, row_ids: Tensor, num_samples: int, targets: Tensor | None = None
    ) -> ScoredSample:
        """The same with differentiable log-probs of what is drawn; see `sample_and_score`."""
        return sample_and_score(
            hidden, weight, row_ids=row_ids, num_samples=num_samples, targets=targets, **asdict(self)
        )

    def score(self, hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [N, M] of tokens [N, M] and entropy [N], of the full tempered distribution, with gradient.

        See `linear_token_log_probs`. Truncation shapes what is drawn, not what it is scored by.
        """
        return linear_token_log_probs(
            hidden, weight, tokens, temperature=self.temperature, return_entropy=True, impl=self.impl
        )
