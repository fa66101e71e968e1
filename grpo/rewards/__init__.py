"""Rewards of completions: one kind a file, and their weighted sum. docs/extending.md shows how to add one."""

from grpo.rewards.base import DecodedBatch, PopulationReward, Reward, RewardContext, Term
from grpo.rewards.reward_sum import Rewarded, RewardSum, build_rewards, check_rewards
from grpo.rewards.watch import RewardWatch, Seen
