"""The rollout of a recipe."""

from collections.abc import Callable

from torch import Tensor, nn

from grpo.config import Rollout, Sampling, Schedule
from grpo.data import ImageBatch
from grpo.kernels import Draw
from grpo.rollout.autoregressive import AutoregressiveRollout
from grpo.rollout.teacher_forced import TeacherForcedRollout
from grpo.rollout.trajectory import Trajectory


def build_draw(section: Rollout | Sampling, *, seed: int, impl: str) -> Draw:
    """How a section wants tokens to be drawn."""
    return Draw(temperature=section.temperature, top_k=section.top_k, top_p=section.top_p, seed=seed, impl=impl)


def build_rollout(
    model: nn.Module,
    encode: Callable[[ImageBatch], Tensor],
    config: Rollout,
    *,
    draw: Draw,
    schedule: Schedule,
) -> Callable[[ImageBatch], Trajectory]:
    """A function from [B] images to their trajectory.

    Args:
        model: the policy.
        encode: images -> codes [B, T], by the frozen tokenizer.
        config: the rollout section.
        draw: how tokens are drawn.
        schedule: sizes of the step.
    """
    mode = TeacherForcedRollout if config.mode == "teacher_forced" else AutoregressiveRollout
    return mode(model, encode, config, draw=draw, schedule=schedule)
