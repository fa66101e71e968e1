"""The life of a training run, its optimizer, the policy update and the loop of supervised jobs."""

from grpo.training.adversary import ADVERSARY_NAME, Adversary
from grpo.training.banner import in_words
from grpo.training.build import (
    autocast,
    build_classifier,
    build_data,
    build_frozen,
    build_generator,
    build_reader,
    build_trainable_tokenizer,
)
from grpo.training.codebook import Codebook
from grpo.training.judge import RunJudge, build_judge
from grpo.training.moving_average import MovingAverage
from grpo.training.optimizer import GuardedOptimizer, build_optimizer, learning_rate
from grpo.training.phases import GRID_NAME, Phase, run_phases
from grpo.training.run import TrainingRun
from grpo.training.supervised import minimise
from grpo.training.update import PolicyUpdate
