"""Distillation of guidance and temperature into one forward: on the student's own samples, dense per token.

grpo distill --config quickstart/distill
torchrun --nproc_per_node=8 -m grpo distill --config quickstart/distill
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("distill")

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.config import DistillRecipe, load_recipe
from grpo.data import ImageBatch
from grpo.kernels import Draw, linear_kl
from grpo.models import Condition, build_tokenizer
from grpo.parallel import World, distributed
from grpo.rollout import CodeSampler, hidden_states
from grpo.training import (
    TrainingRun,
    build_data,
    build_frozen,
    build_generator,
    build_judge,
    build_optimizer,
    minimise,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(DistillRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


class Drawn(NamedTuple):
    """Images that the student has drawn."""

    condition: Condition  # B rows
    tokens: Tensor  # [B, T]

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def parts(self, size: int) -> list["Drawn"]:
        starts = (slice(start, start + size) for start in range(0, self.rows, size))
        return [Drawn(self.condition.select(part), self.tokens[part]) for part in starts]


def train(recipe: DistillRecipe, world: World) -> None:
    """The whole job on this rank."""
    training, distill = recipe.training, recipe.distill
    with TrainingRun(recipe, world, title="Distillation") as run:
        dataset = build_data(recipe)
        dataset.reads_images = False  # conditions are enough
        places = {"class_names": dataset.class_names, "mesh": run.mesh, "world": world}
        student = build_generator(recipe, checkpoint=recipe.model.checkpoint, **places)
        start = distill.teacher_checkpoint or recipe.model.checkpoint
        teacher = build_frozen(recipe, student, checkpoint=start, **places)
        draw = Draw(seed=training.seed, impl=training.kernels)
        draw_codes = CodeSampler(student, draw=draw, max_rows=distill.max_rows)

        def rollout(images: ImageBatch) -> Drawn:
            with run.timer("rollout"):
                return Drawn(images.condition, draw_codes(images.condition, row_ids=images.sample_ids).tokens)

        def loss(drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
            context = drawn.tokens[:, :-1]
            with run.timer("teacher"), torch.no_grad():
                guided = hidden_states(teacher, context, drawn.condition, cfg_scale=distill.cfg_scale)  # [B, T, D]
            with run.timer("forward"):
                hidden = hidden_states(student, context, drawn.condition)
                forward, reverse = linear_kl(
                    hidden.flatten(0, 1), student.output.weight, guided.flatten(0, 1), teacher.output.weight,
                    teacher_temperature=distill.temperature,
                )  # fmt: skip
            forward, reverse = forward.mean(), reverse.mean()  # nats a token
            return torch.lerp(forward, reverse, distill.reverse_share), {"kl": reverse, "kl_forward": forward}

        tokenizer = build_tokenizer(recipe.tokenizer, device=world.device, seed=training.seed)  # for the judge to see
        judge = build_judge(recipe, student, tokenizer, dataset, world)
        optimizer = build_optimizer(student, recipe, world)
        minimise(run, student, dataset, loss, prepare=rollout, optimizer=optimizer, judge=judge)
