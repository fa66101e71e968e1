"""How much more likely a frozen generator finds the completion when it knows what was asked for."""

from typing import Annotated

import torch
from torch import Tensor

from grpo.config import RewardTable
from grpo.config.types import Wanted
from grpo.kernels import linear_token_log_probs
from grpo.rewards.base import DecodedBatch, Reward, RewardContext


class LogRatio(Reward):
    """Σ over the codes of log p(code given condition, codes before) - log p(code given nothing, codes before), nats.

    Both under a frozen generator at temperature 1, with the completion as its own context. With reward weight g and KL
    weight b to the same generator, the best policy is p(x given c)^(1 + g/b) p(x given nothing)^(-g/b): the target of
    classifier-free guidance on whole sequences, drawn with one forward. It needs no other network.
    """

    class Settings(RewardTable):
        """Log-ratio of the conditional to the unconditional probability of the whole completion."""

        checkpoint: Annotated[str | None, Wanted("weights of the frozen generator")] = None
        """Weights of the frozen generator; none is the policy's own start, shared with the KL term's reference."""

    needs = frozenset({"generator"})

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        assert context.generator is not None, "the job gives a way to build generators"
        self.generator = context.generator(settings.checkpoint)

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        tokens, condition = batch.tokens, batch.condition.with_unconditional()
        hidden = self.generator.hidden(tokens[:, :-1].repeat(2, 1), condition)  # [2n, T, D]
        asked = tokens.repeat(2, 1).flatten()[:, None]  # [2n*T, 1]
        log_probs = linear_token_log_probs(hidden.flatten(0, 1), self.generator.output.weight, asked)
        with_condition, without = torch.chunk(log_probs.view(2 * len(tokens), -1).sum(dim=1), 2)
        return with_condition - without
