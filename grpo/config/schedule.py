"""How a rollout is cut into parts, optimizer steps and micro-batches: computed once, read by everyone."""

import math
from dataclasses import dataclass

from grpo.config.errors import UserError
from grpo.config.policy_sections import Objective, Rollout
from grpo.config.sections import Training

DROPOUT_PASSES = {"eval": (False,), "train": (True,), "twice": (False, True)}
"""Of each `training.dropout_mode`: the passes of an optimizer step over its batch, and whether each is with dropout."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The sizes of one training step of GRPO on one rank."""

    ranks: int  # processes that share the batch
    images: int  # B, images of one rollout
    group_size: int  # G, completions of each image
    completions_per_step: int  # completions of one optimizer step
    epochs: int = 1  # times that a rollout passes through the optimizer steps
    micro_batch_size: int  # rows of one forward and backward, at most
    scores_targets: bool  # whether the codes of real images are part of the loss
    rows_of_a_condition: int = 1  # neighbours in a forward of the update that were asked the same and drop nothing
    dropout_passes: tuple[bool, ...] = (False,)  # of an optimizer step over its batch; whether each is with dropout
    trains_sampling_forward: bool
    """Whether the update trains on the graph that a teacher-forced rollout keeps: where `in_parts`, in the pass without
    dropout, as rollouts are."""
    in_parts: bool = False
    """Whether teacher-forced images go from rollout to backward one micro-batch after the other. It takes one optimizer
    step a rollout, and rewards that need no look at other images before the first backward."""

    @staticmethod
    def of(
        *, rollout: Rollout, training: Training, objective: Objective, ranks: int, whole_batch_rewards: bool = False
    ) -> "Schedule":
        """The schedule on so many ranks, where `whole_batch_rewards` look at all completions of a rollout together.

        Raises:
            UserError: the batches cannot be cut so, or not be shared by the ranks.
        """
        group, drawn = rollout.num_generations, rollout.batch_size * rollout.num_generations
        step = training.batch_size or drawn
        if drawn % step:
            raise UserError(
                f"training.batch_size = {step} completions of one optimizer step must divide "
                f"rollout.batch_size x rollout.num_generations = {drawn} completions of one rollout"
            )
        for key, size in (("rollout.batch_size", rollout.batch_size), ("training.batch_size", step)):
            if size % ranks:
                raise UserError(f"{key} = {size} cannot be shared by {ranks} ranks: make it a multiple of {ranks}")
        share = step // ranks
        if share % group and group % share:
            on_each = f", {share} on each of {ranks} ranks," if ranks > 1 else ""
            raise UserError(
                f"training.batch_size = {step}{on_each} must be a multiple or a divisor of "
                f"rollout.num_generations = {group}"
            )
        passes = DROPOUT_PASSES[training.dropout_mode]
        waits = whole_batch_rewards or objective.advantage == "batch_std"
        one_step = step == drawn and training.epochs_per_rollout == 1
        forced = rollout.mode == "teacher_forced"
        in_parts = forced and one_step and not waits
        alone = forced or any(passes)
        micro_batch = training.micro_batch_size or share  # 0: all, or what is not chosen yet
        return Schedule(
            ranks=ranks,
            images=rollout.batch_size // ranks,
            group_size=group,
            completions_per_step=share,
            epochs=training.epochs_per_rollout,
            micro_batch_size=micro_batch,
            trains_sampling_forward=in_parts and False in passes,
            in_parts=in_parts,
            scores_targets=objective.aux_ce_weight > 0,
            rows_of_a_condition=1 if alone else math.gcd(group, share, micro_batch),
            dropout_passes=passes,
        )

    @property
    def completions(self) -> int:
        """Completions of one rollout."""
        return self.images * self.group_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that one rollout feeds."""
        return self.epochs * (self.completions // self.completions_per_step)

    @property
    def on_policy(self) -> bool:
        """Whether the policy that samples is the one that is trained, so that old log-probs are the new ones."""
        return self.steps_per_rollout == 1

    @property
    def images_per_part(self) -> int:
        """Images of one rollout call: a micro-batch where no others are waited for, else the whole rollout."""
        in_parts = self.in_parts or self.trains_sampling_forward
        return min(self.micro_batch_size, self.images) if in_parts else self.images
