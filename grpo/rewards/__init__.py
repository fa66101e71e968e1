"""Rewards of completions: one kind a file, and their weighted sum. docs/rewards.md shows how to add one."""

from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.reward_sum import Rewarded, RewardSum, build_rewards
