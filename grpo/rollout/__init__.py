"""Rollouts: conditions -> Trajectory."""

from grpo.rollout.autoregressive import AutoregressiveRollout, decode, generate
from grpo.rollout.build import build_rollout
from grpo.rollout.decoder import Decoded
from grpo.rollout.scoring import score
from grpo.rollout.teacher_forced import TeacherForcedRollout
from grpo.rollout.trajectory import Scores, Trajectory, real_rows

__all__ = [
    "AutoregressiveRollout",
    "Decoded",
    "Scores",
    "TeacherForcedRollout",
    "Trajectory",
    "build_rollout",
    "decode",
    "generate",
    "real_rows",
    "score",
]
