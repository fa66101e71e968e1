"""Rollouts: conditions -> Trajectory; scoring; images from conditions."""

from grpo.rollout.autoregressive import AutoregressiveRollout, generate, sample_codes
from grpo.rollout.build import build_draw, build_rollout
from grpo.rollout.cached_sampler import SampledCodes
from grpo.rollout.image_sampler import ImageSampler, load_sampler
from grpo.rollout.random_streams import RandomStream
from grpo.rollout.scoring import score
from grpo.rollout.teacher_forced import TeacherForcedRollout
from grpo.rollout.trajectory import Scores, Trajectory, real_rows

__all__ = [
    "AutoregressiveRollout",
    "ImageSampler",
    "RandomStream",
    "SampledCodes",
    "Scores",
    "TeacherForcedRollout",
    "Trajectory",
    "build_draw",
    "build_rollout",
    "generate",
    "load_sampler",
    "real_rows",
    "sample_codes",
    "score",
]
