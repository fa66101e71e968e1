"""Decode completions and add up their rewards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.config import Reward as RewardConfig
from grpo.config import UserError
from grpo.models import VQModel, load_classifier
from grpo.rewards.base import Completions, Reward
from grpo.rewards.class_log_prob import ClassLogProb
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
        tokenizer: frozen.
        terms: (reward, weight) pairs.
        batch_size: completions decoded and scored at once.
    """

    def __init__(self, tokenizer: VQModel, terms: Sequence[tuple[Reward, float]], *, batch_size: int) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.rewards = [reward for reward, _ in terms]
        self.weights = [weight for _, weight in terms]

    @property
    def names(self) -> list[str]:
        """Names of the K rewards."""
        return [reward.name for reward in self.rewards]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, class_ids: Tensor, real_images: Tensor, *, show: int = 0) -> Rewards:
        """Score completions.

        Args:
            tokens: [B, G, T] int64.
            class_ids: [B] int64.
            real_images: [B, 3, H, W] in [-1, 1].
            show: return the decoded completions of the first `show` images.
        """
        size, group, length = tokens.shape
        image_of = torch.arange(size, device=tokens.device).repeat_interleave(group)  # [B*G]
        flat = tokens.reshape(size * group, length)
        scores, shown = [], []
        for start in range(0, size * group, self.batch_size):
            rows = slice(start, start + self.batch_size)
            images = self.tokenizer.decode(flat[rows])
            completions = Completions(images, flat[rows], class_ids[image_of[rows]], real_images[image_of[rows]])
            scores.append(torch.stack([reward(completions).float() for reward in self.rewards]))
            if start < show * group:
                shown.append(images[: show * group - start].float())
        components = torch.cat(scores, dim=1).view(-1, size, group)
        total = torch.einsum("kbg,k->bg", components, components.new_tensor(self.weights))
        images = torch.cat(shown).view(-1, group, *shown[0].shape[1:]) if shown else components.new_empty(0)
        return Rewards(total, components, images)


def build_rewards(config: RewardConfig, tokenizer: VQModel, *, num_classes: int, device: torch.device) -> RewardSum:
    """The rewards of a recipe whose weight is not 0.

    Raises:
        UserError: the classifier's number of classes is not the model's.
    """
    terms: list[tuple[Reward, float]] = []
    if config.reconstruction_weight:
        terms.append((Reconstruction(config.reconstruction), config.reconstruction_weight))
    if config.class_log_prob_weight:
        classifier = load_classifier(config.classifier_checkpoint).to(device).requires_grad_(False)
        if classifier.config.num_classes != num_classes:
            raise UserError(
                f"reward.classifier_checkpoint: {config.classifier_checkpoint} knows {classifier.config.num_classes} "
                f"classes, model.num_classes is {num_classes}; give a classifier of the same classes"
            )
        terms.append((ClassLogProb(classifier), config.class_log_prob_weight))
    if config.embedding_cosine and config.embedding_cosine_weight:
        terms.append((EmbeddingCosine(tokenizer), config.embedding_cosine_weight))
    return RewardSum(tokenizer, terms, batch_size=config.batch_size)
