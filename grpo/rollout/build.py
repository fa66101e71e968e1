"""The rollout of a recipe."""

from collections.abc import Callable

from torch import Tensor, nn

from grpo.config import Rollout
from grpo.data import ImageBatch
from grpo.rollout.autoregressive import AutoregressiveRollout
from grpo.rollout.compiled_blocks import compilation_pays
from grpo.rollout.teacher_forced import TeacherForcedRollout
from grpo.rollout.trajectory import Trajectory


def build_rollout(
    model: nn.Module,
    encode: Callable[[ImageBatch], Tensor],
    config: Rollout,
    *,
    seed: int,
    impl: str,
    keep_graph: bool,
    with_real: bool,
    rollouts: int = 0,
) -> Callable[[ImageBatch], Trajectory]:
    """A function from [B] images to their trajectory.

    Args:
        model: the policy.
        encode: images -> codes [B, T], by the frozen tokenizer.
        config: the rollout section.
        seed: of the run.
        impl: backend of sampling.
        keep_graph: a teacher-forced forward is trained on directly (`PolicyUpdate.shares_forward`).
        rollouts: how many there will be, for what costs time once; 0 if nobody knows.
        with_real: the auxiliary cross-entropy is on: real images must be scored too.
    """
    if config.mode == "teacher_forced":
        return TeacherForcedRollout(
            model, encode, config, seed=seed, keep_graph=keep_graph, with_targets=with_real, impl=impl
        )
    compiled = compilation_pays(model.output.weight.device, rollouts * model.config.block_size)
    return AutoregressiveRollout(model, encode if with_real else None, config, seed=seed, impl=impl, compiled=compiled)
