"""What the training jobs share: models of a recipe, the optimizer step, the policy update, the run."""

from grpo.training.build import build_gpt, build_tokenizer, gpt_config
from grpo.training.codebook import Codebook
from grpo.training.convolutional import autocast, build_classifier, build_trainable_tokenizer
from grpo.training.metrics import MetricSums
from grpo.training.optimizer import OptimizerStep, learning_rate
from grpo.training.phases import Phase, run_phases
from grpo.training.run import EXPORT_NAME, TrainingRun
from grpo.training.throughput import Work, grpo_work
from grpo.training.update import PolicyUpdate, build_update, optimizer_steps

__all__ = [
    "EXPORT_NAME",
    "Codebook",
    "MetricSums",
    "OptimizerStep",
    "Phase",
    "PolicyUpdate",
    "TrainingRun",
    "Work",
    "autocast",
    "build_classifier",
    "build_gpt",
    "build_tokenizer",
    "build_trainable_tokenizer",
    "build_update",
    "gpt_config",
    "grpo_work",
    "learning_rate",
    "optimizer_steps",
    "run_phases",
]
