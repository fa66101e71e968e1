"""GRPO of an autoregressive image generator: rollout -> reward -> credit -> update -> observe.

grpo train --config debug
torchrun --nproc_per_node=8 -m grpo train --config published/vapi_xxl_384
torchrun --nproc_per_node=8 recipes/train_grpo.py --config train_configs/published/vapi_xxl_384.toml
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("train")

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor, nn

from grpo.config import GRPORecipe, Schedule, load_recipe
from grpo.data import ImageBatch, ImageStream, build_codes, build_stream, sample_images
from grpo.estimate import Work, grpo_work
from grpo.models import build_tokenizer
from grpo.objectives import credit
from grpo.observe import SampleRow
from grpo.parallel import MetricSums, World, distributed
from grpo.position import counted
from grpo.rewards import Rewarded, RewardSum, RewardWatch, build_rewards
from grpo.rollout import Trajectory, build_draw, build_rollout
from grpo.training import (
    PolicyUpdate,
    RunJudge,
    TrainingRun,
    build_data,
    build_frozen,
    build_generator,
    build_judge,
    build_optimizer,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(GRPORecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: GRPORecipe, world: World) -> None:
    """The whole job on this rank."""
    with TrainingRun(recipe, world, title="GRPO") as run:
        recipe = run.recipe  # with what was left to be chosen
        job = build(recipe, run)
        extra = {"reward": job.reward, "entropy": job.update.entropy_control}
        trained = {"model": job.policy, "optimizer": job.update.optimizer, "stream": job.stream}
        run.start(**trained, judge=job.judge, extra=extra)
        watch = RewardWatch(job.reward.terms)
        for step in run.steps():
            metrics, shown = MetricSums(), []
            with run.timer("data"):
                images = next(job.stream).to(world.device)  # [B] images and what they were asked to be
            for batch in counted(images.parts(job.schedule.images_per_part), "part"):
                show = recipe.metrics.image_groups if run.observer.wants_images(step) and not shown else 0
                with run.timer("rollout"):
                    trajectory = job.rollout(batch)  # tokens [R, M, T]
                asked = batch.condition, batch.images, batch.captions, trajectory.completion_ids
                rewarded = job.reward(trajectory.tokens, *asked, show=show, timer=run.timer)
                trajectory.rewards = rewarded.total  # [R, M]
                trajectory.advantages, credited = job.credit(rewarded)  # [R, M]
                with run.timer("update"):
                    updated = job.update(trajectory)  # clipped ratio, in micro-batches
                metrics.merge(rewarded.metrics(), credited, updated)
                if show:
                    shown = sample_rows(batch, rewarded, job)
            run.observer.images(step, shown)
            drawn, codes = job.schedule.completions * world.size, job.policy.config.block_size
            run.finish(step, metrics, images=drawn, codes=codes, work=job.work, watch=watch)


class Job(NamedTuple):
    """What a GRPO run works with."""

    schedule: Schedule
    stream: ImageStream
    policy: nn.Module
    rollout: Callable[[ImageBatch], Trajectory]
    reward: RewardSum
    credit: Callable[[Rewarded], tuple[Tensor, MetricSums]]
    update: PolicyUpdate
    judge: RunJudge | None
    work: Work  # of a step on one rank, to tell how well the devices are used
    shows_real: bool  # whether completions are of the real images


def build(recipe: GRPORecipe, run: TrainingRun) -> Job:
    """Data, models, rollout, rewards and update of a recipe."""
    training, objective, world, seed = recipe.training, recipe.objective, run.world, recipe.training.seed
    schedule = recipe.schedule(ranks=world.size)
    dataset = build_data(recipe)
    tokenizer = build_tokenizer(recipe.tokenizer, device=world.device, seed=seed)
    if recipe.compile.enabled:
        tokenizer.encoder.compile()
    length = (recipe.data.image_size // recipe.tokenizer.downsample_size) ** 2
    codes = build_codes(dataset, tokenizer, length=length, augmented=False, images=recipe.reads_images)
    images, workers = recipe.rollout.batch_size, recipe.data.num_workers
    stream = build_stream(dataset, batch_size=images, seed=seed, num_workers=workers, world=world)
    places = {"class_names": dataset.class_names, "mesh": run.mesh, "world": world}
    policy, reference = build_generator(recipe, checkpoint=recipe.model.checkpoint, **places).eval(), None
    follows = objective.reference == "ema"  # the reference is the moving average of the policy

    @cache  # one for the KL term and the rewards where both want the same weights
    def frozen(checkpoint: str | None) -> nn.Module:
        return build_frozen(recipe, policy, checkpoint=checkpoint, **places)

    reward = build_rewards(
        recipe.reward,
        tokenizer,
        class_names=dataset.class_names,
        device=world.device,
        compile=recipe.compile,
        generator=lambda checkpoint: frozen(checkpoint or recipe.model.checkpoint),
        real_images=partial(sample_images, dataset, world=world),
        has_prompts=dataset.requests is not None,
    )
    if objective.kl_estimator != "none" and follows:
        reference = build_generator(recipe, checkpoint=recipe.model.checkpoint, **places).eval().requires_grad_(False)
    elif objective.kl_estimator != "none":
        reference = frozen(objective.reference_checkpoint or recipe.model.checkpoint)
    sampling = {"draw": build_draw(recipe.rollout, seed=seed, impl=training.kernels), "schedule": schedule}
    rollout = build_rollout(policy, run.timer("encode")(codes), recipe.rollout, **sampling)
    optimizer = build_optimizer(
        policy,
        recipe,
        world,
        steps_per_training_step=schedule.steps_per_rollout,
        average_into=reference if follows else None,
    )
    update = PolicyUpdate(
        policy, optimizer, objective=objective, rollout=recipe.rollout, reference=reference, **sampling
    )
    return Job(
        schedule=schedule,
        stream=stream,
        policy=policy,
        rollout=rollout,
        reward=reward,
        credit=partial(credit, group_size=schedule.group_size, objective=objective),
        update=update,
        judge=build_judge(recipe, policy, tokenizer, dataset, world),
        work=grpo_work(recipe, policy.config, schedule),
        shows_real=recipe.rollout.mode == "teacher_forced" and dataset.reads_images,
    )


def sample_rows(batch: ImageBatch, rewarded: Rewarded, job: Job) -> list[SampleRow]:
    """Rows of the image grid: the real image, where completions are of it, completions, rewards, the caption."""
    groups = rewarded.total.view(batch.rows, -1)  # [B, G]
    rows = zip(batch.images, rewarded.images, groups, batch.captions, strict=False)
    return [SampleRow(real if job.shows_real else None, drawn, rewards, text) for real, drawn, rewards, text in rows]
