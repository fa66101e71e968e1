"""Rewards of completions: one a file, and their weighted sum."""

from grpo.rewards.base import Completions, Reward
from grpo.rewards.class_log_prob import ClassLogProb
from grpo.rewards.reconstruction import EmbeddingCosine, Reconstruction
from grpo.rewards.weighted_sum import Rewards, RewardSum, build_rewards

__all__ = [
    "ClassLogProb",
    "Completions",
    "EmbeddingCosine",
    "Reconstruction",
    "Reward",
    "RewardSum",
    "Rewards",
    "build_rewards",
]
