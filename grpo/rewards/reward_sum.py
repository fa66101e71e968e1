"""Decode completions and add up their rewards."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.config import Compile, Rewards, UserError, reward_class
from grpo.models import Condition, VQModel
from grpo.parallel import MetricSums
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.networks import decode_batch, reward_dtype

Timer = Callable[[str], AbstractContextManager]


class Rewarded(NamedTuple):
    """Rewards of completions [R, M, T]."""

    total: Tensor  # [R, M] fp32, the weighted sum
    components: Tensor  # [K, R, M] fp32, before the weights; where one abstains, its mean over the rest of the group
    abstained: dict[str, Tensor]  # of each reward that may abstain: [R, M] bool
    names: Sequence[str]
    weights: Sequence[float]
    images: Tensor  # [S, G, 3, H, W] decoded completions of the first S conditions, to be shown

    def metrics(self) -> MetricSums:
        """Mean and spread of the sum and of each reward where it did not abstain, and the share where it did."""
        metrics = MetricSums()
        metrics.add_values("reward", self.total)
        for name, values in zip(self.names, self.components, strict=True):
            if (abstained := self.abstained.get(name)) is not None:
                metrics.add(f"reward/{name}_abstained", abstained.sum(), abstained.numel())
                values = values[~abstained]
            metrics.add_values(f"reward/{name}", values)
        return metrics


@dataclass
class RewardSum:
    """The tokenizer's decoder and K weighted rewards."""

    tokenizer: VQModel  # frozen, in the precision of the rewards
    terms: Mapping[str, tuple[Reward, float]]  # name -> reward and weight
    batch_size: int  # completions decoded and scored at once, at most; 0 is what fits into a GPU's memory, 64 on a CPU

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        condition: Condition,
        real_images: Tensor,
        captions: Sequence[str] = (),
        *,
        show: int = 0,
        timer: Timer = nullcontext,
    ) -> Rewarded:
        """Score completions.

        Args:
            tokens: [R, M, T] int64: one group of G = R * M / B completions after the other.
            condition: B rows, one a group.
            real_images: [B, 3, H, W] in [-1, 1].
            captions: B texts, what the conditions ask for in words.
            show: return the decoded completions of the first `show` conditions.
            timer: counts the phases "decode" and "reward".
        """
        flat, scores, shown = tokens.flatten(0, 1), [], []  # [B * G, T]
        group = len(flat) // condition.rows
        config, weight = self.tokenizer.config, self.tokenizer.post_quant_conv.weight
        most = self.batch_size or decode_batch(config, flat.shape[1], dtype=weight.dtype, device=weight.device)
        size = most - most % group if most > group else most  # whole groups, so that a real image is in one batch only
        with timer("reward"):
            for start in range(0, len(flat), size):
                part = flat[start : start + size]
                with timer("decode"):
                    images = self.tokenizer.decode(part)
                image_of = torch.arange(start, start + len(part), device=flat.device) // group
                first, last = start // group, (start + len(part) - 1) // group
                of_group = slice(first, last + 1)
                asked = condition.select(image_of), real_images[of_group], image_of - first, captions[of_group]
                batch = DecodedBatch(images, part, *asked)
                scores.append(torch.stack([reward(batch).float() for reward, _ in self.terms.values()]))
                if start < show * group:
                    shown.append(images[: show * group - start].float())
            components = torch.cat(scores, dim=1).unflatten(1, (-1, group))  # [K, B, G]; here a population would score
            images = torch.cat(shown).unflatten(0, (-1, group)) if shown else components.new_empty(0)
            return self._add_up(components, images, shape=tokens.shape[:2])

    def _add_up(self, components: Tensor, images: Tensor, *, shape: torch.Size) -> Rewarded:
        abstained = {}
        for (name, (reward, _)), values in zip(self.terms.items(), components, strict=True):
            if reward.may_abstain:
                missing = values.isnan()  # [B, G]
                abstained[name] = missing.view(shape)
                others = values.nanmean(dim=1, keepdim=True).masked_fill(missing.all(dim=1, keepdim=True), 0.0)
                values.copy_(torch.where(missing, others, values))  # so that it moves nothing in its group
        weights = [weight for _, weight in self.terms.values()]
        total = torch.einsum("kbg,k->bg", components, components.new_tensor(weights))
        return Rewarded(total.view(shape), components.view(-1, *shape), abstained, list(self.terms), weights, images)


def build_rewards(
    config: Rewards, tokenizer: VQModel, *, class_names: Sequence[str], device: torch.device, compile: Compile
) -> RewardSum:
    """The rewards of a recipe whose weight is not 0, with networks in its precision.

    In bf16 they have a copy of the tokenizer: the codes of real images are always found by the original.

    Raises:
        UserError: rewards that cannot be built, all of them.
    """
    context = RewardContext(tokenizer, device, reward_dtype(config.precision, device), class_names)
    context = replace(context, tokenizer=context.prepare(tokenizer))
    terms, problems = {}, []
    for name, table in config.active.items():
        try:
            terms[name] = reward_class(table.kind)(table, context), table.weight
        except UserError as error:
            problems += [f"reward.{name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
    if compile.enabled:
        for network in (context.tokenizer.decoder, *(net for reward, _ in terms.values() for net in reward.networks)):
            network.compile()
    return RewardSum(context.tokenizer, terms, batch_size=config.batch_size)
