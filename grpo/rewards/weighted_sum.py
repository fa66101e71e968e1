"""Decode completions and add up their rewards."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo.config import Compile, UserError
from grpo.config import Reward as RewardConfig
from grpo.models import VQModel, load_classifier
from grpo.rewards.base import Completions, Reward
from grpo.rewards.class_log_prob import ClassLogProb
from grpo.rewards.networks import decode_batch, prepare, reward_dtype
from grpo.rewards.reconstruction import EmbeddingCosine, Reconstruction


class Rewards(NamedTuple):
    """Rewards of G completions of B images."""

    total: Tensor
    """[B, G] fp32, the weighted sum."""
    components: Tensor
    """[K, B, G] fp32, each reward before its weight."""
    images: Tensor
    """[S, G, 3, H, W] decoded completions of the first S images, to be shown."""


class RewardSum:
    """The tokenizer's decoder and K weighted rewards.

    Args:
        tokenizer: frozen, in the precision of the rewards.
        terms: (reward, weight) pairs.
        batch_size: completions decoded and scored at once, at most; 0 is what fits into a GPU's memory, 64 on a CPU.
        other_work: between `start` and its result a GPU has something else to do.
    """

    def __init__(
        self,
        tokenizer: VQModel,
        terms: Sequence[tuple[Reward, float]],
        *,
        batch_size: int,
        other_work: bool = False,
    ) -> None:
        self.tokenizer, self.batch_size, self.other_work = tokenizer, batch_size, other_work
        self.rewards = [reward for reward, _ in terms]
        self.weights = [weight for _, weight in terms]
        self._stream: torch.cuda.Stream | None = None

    @property
    def names(self) -> list[str]:
        """Names of the K rewards."""
        return [reward.name for reward in self.rewards]

    def start(self, tokens: Tensor, *arguments: Tensor, **options: Any) -> Callable[[], Rewards]:
        """`__call__`, with the same arguments, as work in the background; the result waits for it and returns it.

        On a GPU it has a stream of its own, if there is `other_work`: decoding then runs beside that. The stream has
        its own cache of freed memory, so it is not free. On a CPU the rewards are ready when this returns.
        """
        if not (tokens.is_cuda and self.other_work):
            rewards = self(tokens, *arguments, **options)
            return lambda: rewards
        present = torch.cuda.current_stream(tokens.device)
        self._stream = self._stream or torch.cuda.Stream(tokens.device)
        self._stream.wait_stream(present)  # for the tokens, and until nobody reads the rewards before these any more
        with torch.cuda.stream(self._stream):
            rewards = self(tokens, *arguments, **options)

        def join(*inputs: Tensor) -> Rewards:
            torch.cuda.current_stream(tokens.device).wait_stream(self._stream)
            return rewards

        return partial(join, tokens, *arguments)  # holds the inputs: their memory must not be given away before

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        class_ids: Tensor,
        real_images: Tensor,
        *,
        show: int = 0,
        timer: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> Rewards:
        """Score completions.

        Args:
            tokens: [B, G, T] int64.
            class_ids: [B] int64.
            real_images: [B, 3, H, W] in [-1, 1].
            show: return the decoded completions of the first `show` images.
            timer: counts the phases "decode" and "reward".
        """
        with timer("reward"):
            return self._score(tokens, class_ids, real_images, show=show, timer=timer)

    def _score(
        self,
        tokens: Tensor,
        class_ids: Tensor,
        real_images: Tensor,
        *,
        show: int,
        timer: Callable[[str], AbstractContextManager],
    ) -> Rewards:
        size, group, length = tokens.shape
        flat = tokens.reshape(size * group, length)
        batch = self._batch(group, length)
        scores, shown = [], []
        for start in range(0, size * group, batch):
            stop = min(start + batch, size * group)
            with timer("decode"):
                images = self.tokenizer.decode(flat[start:stop])
            completions = _completions(images, flat, class_ids, real_images, start=start, group=group)
            scores.append(torch.stack([reward(completions).float() for reward in self.rewards]))
            if start < show * group:
                shown.append(images[: show * group - start].float())
        components = torch.cat(scores, dim=1).view(-1, size, group)
        total = torch.einsum("kbg,k->bg", components, components.new_tensor(self.weights))
        images = torch.cat(shown).view(-1, group, *shown[0].shape[1:]) if shown else components.new_empty(0)
        return Rewards(total, components, images)

    def _batch(self, group: int, length: int) -> int:
        """Completions of a batch: whole groups where one fits, so that each real image is in one batch only."""
        weight = self.tokenizer.post_quant_conv.weight
        config = self.tokenizer.config
        most = self.batch_size or decode_batch(config, length, dtype=weight.dtype, device=weight.device)
        return most - most % group if most > group else most


def _completions(
    images: Tensor, tokens: Tensor, class_ids: Tensor, real_images: Tensor, *, start: int, group: int
) -> Completions:
    """The completions whose decoded `images` [n, 3, H, W] begin at place `start` of all B*G."""
    image_of = torch.arange(start, start + len(images), device=tokens.device) // group
    first, last = start // group, (start + len(images) - 1) // group
    return Completions(
        images,
        tokens[start : start + len(images)],
        class_ids[image_of],
        real_images[first : last + 1],
        image_of - first,
    )


def build_rewards(
    config: RewardConfig,
    tokenizer: VQModel,
    *,
    num_classes: int,
    device: torch.device,
    compile: Compile,
    other_work: bool = False,
) -> RewardSum:
    """The rewards of a recipe whose weight is not 0, with networks in its precision.

    In bf16 they have a copy of the tokenizer: the codes of real images are always found by the original.

    Raises:
        UserError: the classifier's number of classes is not the model's.
    """
    dtype = reward_dtype(config.precision, device)
    tokenizer = prepare(tokenizer, dtype)
    networks: list[nn.Module] = [tokenizer.decoder]
    terms: list[tuple[Reward, float]] = []
    if config.reconstruction_weight:
        terms.append((Reconstruction(config.reconstruction), config.reconstruction_weight))
    if config.class_log_prob_weight:
        classifier = prepare(load_classifier(config.classifier_checkpoint).to(device).requires_grad_(False), dtype)
        if classifier.config.num_classes != num_classes:
            raise UserError(
                f"reward.classifier_checkpoint: {config.classifier_checkpoint} knows {classifier.config.num_classes} "
                f"classes, model.num_classes is {num_classes}; give a classifier of the same classes"
            )
        terms.append((ClassLogProb(classifier), config.class_log_prob_weight))
        networks.append(classifier)
    if config.embedding_cosine and config.embedding_cosine_weight:
        terms.append((EmbeddingCosine(tokenizer), config.embedding_cosine_weight))
        networks.append(tokenizer.encoder)
    if compile.enabled:
        for network in networks:
            network.compile()
    return RewardSum(tokenizer, terms, batch_size=config.batch_size, other_work=other_work)
