"""Decode completions and score them by all rewards."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.config import Compile, Rewards, UserError, reward_class
from grpo.models import Condition, Generator, VQModel, WithoutAdapter, fold_upsampling
from grpo.parallel import MetricSums
from grpo.position import counted
from grpo.rewards.base import DecodedBatch, PopulationReward, RewardContext, Term
from grpo.rewards.networks import decode_batch, reward_dtype

Timer = Callable[[str], AbstractContextManager]


class Rewarded(NamedTuple):
    """Rewards of completions [R, M, T]."""

    total: Tensor  # [R, M] fp32, the weighted sum; who abstains counts as the mean of the group's others, else as 0
    components: Tensor  # [K, R, M] fp32, before normalisation and weights; NaN where one abstains
    terms: Mapping[str, Term]  # K by name
    images: Tensor  # [S, G, 3, H, W] decoded completions of the first S conditions, to be shown

    def metrics(self) -> MetricSums:
        """Mean and spread of the sum and of each reward where it did not abstain, and the share where it did."""
        metrics = MetricSums()
        metrics.add_values("reward", self.total)
        for (name, term), values in zip(self.terms.items(), self.components, strict=True):
            absent = values.isnan()
            if term.reward.may_abstain:
                metrics.add(f"reward/{name}_abstained", absent.sum(), absent.numel())
            metrics.add_values(f"reward/{name}", values, where=~absent)
        return metrics


@dataclass
class RewardSum:
    """The tokenizer's decoder and K weighted rewards."""

    tokenizer: VQModel  # frozen, in the precision of the rewards
    terms: Mapping[str, Term]  # by name
    batch_size: int  # completions decoded and scored at once, at most; 0 is what fits into a GPU's memory, 64 on a CPU

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        condition: Condition,
        real_images: Tensor,
        captions: Sequence[str] = (),
        completion_ids: Tensor | None = None,
        *,
        show: int = 0,
        timer: Timer = nullcontext,
    ) -> Rewarded:
        """Score completions; collective where a reward is of a population.

        Args:
            tokens: [R, M, T] int64: one group of G = R * M / B completions after the other.
            condition: B rows, one a group.
            real_images: [B, 3, H, W] in [-1, 1].
            captions: B texts, what the conditions ask for in words.
            completion_ids: [R, M] int64, the keys of random numbers; None counts them from 0.
            show: return the decoded completions of the first `show` conditions.
            timer: counts the phases "decode", "reward", and of that "reward/NAME".
        """
        flat, group = tokens.flatten(0, 1), tokens.shape[0] * tokens.shape[1] // condition.rows
        found: dict[str, list[Tensor]] = {name: [] for name in self.terms}  # scores, or features of a population
        shown: list[Tensor] = []
        numbers = torch.arange(len(flat), device=flat.device) if completion_ids is None else completion_ids.flatten()
        asked = condition, real_images, captions
        with timer("reward"):
            for start, batch in self._batches(flat, numbers, *asked, group=group, timer=timer):
                for name, term in self.terms.items():
                    with timer(f"reward/{name}"), _named(name):
                        if isinstance(term.reward, PopulationReward):
                            found[name].append(term.reward.features(batch))
                        else:
                            found[name].append(term.reward(batch).float())
                if start < show * group:
                    shown.append(batch.images[: show * group - start].float())
            scores = [self._scores(name, torch.cat(parts), timer=timer) for name, parts in found.items()]
            components = torch.stack(scores).unflatten(1, (-1, group))  # [K, B, G]
            images = torch.cat(shown).unflatten(0, (-1, group)) if shown else components.new_empty(0)
            shape = tokens.shape[:2]
            return Rewarded(self._total(components).view(shape), components.view(-1, *shape), self.terms, images)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the rewards remember of former steps, as `NAME.KEY`: live tensors, for a checkpoint."""
        populations = {
            name: term.reward for name, term in self.terms.items() if isinstance(term.reward, PopulationReward)
        }
        return {
            f"{name}.{key}": tensor
            for name, reward in populations.items()
            for key, tensor in reward.state_tensors().items()
        }

    def _batches(
        self,
        flat: Tensor,
        numbers: Tensor,
        condition: Condition,
        real_images: Tensor,
        captions: Sequence[str],
        *,
        group: int,
        timer: Timer,
    ) -> Iterator[tuple[int, DecodedBatch]]:
        """Completions [B*G, T], numbered [B*G], in batches, decoded, each with the number of its first completion."""
        config, weight = self.tokenizer.config, self.tokenizer.post_quant_conv.weight
        most = self.batch_size or decode_batch(config, flat.shape[1], dtype=weight.dtype, device=weight.device)
        size = whole_groups(len(flat), group, most)
        for start in counted(range(0, len(flat), size), "batch"):
            part = flat[start : start + size]
            with timer("decode"):
                images = self.tokenizer.decode(part)
            image_of = torch.arange(start, start + len(part), device=flat.device) // group
            first, last = start // group, (start + len(part) - 1) // group
            of_group = slice(first, last + 1)
            asked = condition.select(image_of), real_images[of_group], image_of - first, captions[of_group]
            yield start, DecodedBatch(images, part, *asked, completion_ids=numbers[start : start + size])

    def _scores(self, name: str, found: Tensor, *, timer: Timer) -> Tensor:
        """A reward's numbers [N] fp32 from what was found, NaN only where it abstains."""
        reward = self.terms[name].reward
        if isinstance(reward, PopulationReward):
            with timer(f"reward/{name}"), _named(name):
                found = reward.score(found).float()
        return found if reward.may_abstain else found.masked_fill(found.isnan(), float("inf"))

    def _total(self, components: Tensor) -> Tensor:
        """The weighted sum [B, G] of components [K, B, G]."""
        absent = components.isnan()
        others = components.nanmean(dim=2, keepdim=True).masked_fill(absent.all(dim=2, keepdim=True), 0.0)
        weights = components.new_tensor([term.weight for term in self.terms.values()])
        return torch.einsum("kbg,k->bg", torch.where(absent, others, components), weights)


def whole_groups(total: int, group: int, most: int) -> int:
    """Completions of a batch, at most `most` of `total`: whole groups where one fits, so that a real image is in one
    batch only, and batches of equal size where up to twice as many as needed are equal: each size is compiled anew."""
    if most < group:
        return most
    groups, fewest = -(-total // group), -(-total // (most - most % group))
    equal = (parts for parts in range(fewest, 2 * fewest) if groups % parts == 0)
    return group * -(-groups // next(equal, fewest))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Every mistake that a reward tells begins with its table."""
    try:
        yield
    except UserError as error:
        raise UserError([f"reward.{name}: {problem}" for problem in error.problems]) from error


def check_rewards(config: Rewards, *, has_prompts: bool) -> None:
    """What can be told of a recipe's rewards before anything is built. Raises a UserError with all of it."""
    problems: list[str] = []
    for name, table in config.active.items():
        try:
            with _named(name):
                reward_class(table.kind).check(table, has_prompts=has_prompts)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def build_rewards(
    config: Rewards,
    tokenizer: VQModel,
    *,
    class_names: Sequence[str],
    device: torch.device,
    compile: Compile,
    generator: Callable[[str | None], Generator | WithoutAdapter] | None = None,
    real_images: Callable[[int], Iterable[Tensor]] | None = None,
    has_prompts: bool = False,
) -> RewardSum:
    """The rewards of a recipe whose weight is not 0, with networks in its precision.

    In bf16 they have a copy of the tokenizer: the codes of real images are always found by the original. The other
    arguments are those of `RewardContext`.

    Raises:
        UserError: rewards that cannot be built, all of them.
    """
    context = RewardContext(
        tokenizer, device, reward_dtype(config.precision, device), class_names, has_prompts, generator, real_images
    )
    context = replace(context, tokenizer=context.prepare(tokenizer))
    if context.tokenizer is not tokenizer and device.type == "cuda":
        fold_upsampling(context.tokenizer.decoder)  # of a copy that only draws
    terms, problems = {}, []
    for name, table in config.active.items():
        try:
            with _named(name):
                reward = reward_class(table.kind)(table, context)
            terms[name] = Term(reward, table.weight, table.normalise, table.separate)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if compile.enabled:
        networks = (network for term in terms.values() for network in term.reward.networks)
        for network in (context.tokenizer.decoder, *networks):
            network.compile()
    return RewardSum(context.tokenizer, terms, batch_size=config.batch_size)
