"""Rollouts: conditions -> Trajectory; scoring; images from conditions."""

from grpo.rollout.autoregressive import CodeSampler, generate, sample_codes
from grpo.rollout.cached_sampler import SampledCodes
from grpo.rollout.image_sampler import ImageSampler, load_sampler, place_sampler
from grpo.rollout.modes import AutoregressiveRollout, TeacherForcedRollout, build_draw, build_rollout
from grpo.rollout.scoring import hidden_states, score
from grpo.rollout.trajectory import Scores, Trajectory, real_rows
