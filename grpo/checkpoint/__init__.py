"""Durable checkpoints of a training run."""

from grpo.checkpoint.folders import step_of
from grpo.checkpoint.manager import CheckpointManager
from grpo.checkpoint.state import ExtraState, model_tensors, optimizer_tensors
