"""Durable checkpoints of a training run."""

from grpo.checkpoint.manager import CheckpointManager
