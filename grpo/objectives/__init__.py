"""Advantages and the policy loss: one definition of each, in fp32, used by every path."""

from grpo.objectives.advantages import combined_advantages, credit, group_advantages, spreadless_groups
from grpo.objectives.entropy_control import EntropyControl
from grpo.objectives.policy_loss import highest_entropy, policy_loss, token_weights
