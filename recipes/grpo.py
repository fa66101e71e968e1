"""GRPO of an autoregressive image generator: rollout -> reward -> advantage -> update.

python recipes/grpo.py --config train_configs/debug.toml
torchrun --nproc_per_node=8 recipes/grpo.py --config train_configs/vapi_xxl_384.toml
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # this file is named like the package that it imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import nn

from grpo.config import GRPORecipe, load_recipe
from grpo.data import CodeCache, ImageBatch, ImageStream, build_dataset, build_stream
from grpo.objectives import group_advantages, spreadless_groups
from grpo.observe import PhaseTimer, SampleRow
from grpo.parallel import World, build_mesh, distributed, run_main, set_matmul_precision
from grpo.rewards import Rewards, RewardSum, build_rewards
from grpo.rollout import Trajectory, build_rollout
from grpo.training import (
    MetricSums,
    PolicyUpdate,
    TrainingRun,
    Work,
    build_gpt,
    build_tokenizer,
    build_update,
    grpo_work,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(GRPORecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: GRPORecipe, world: World) -> None:
    """The whole job on this rank."""
    with TrainingRun(recipe, world, title="GRPO") as run:
        job = build(recipe, world, run.timer)
        run.start(model=job.policy, step=job.update.step, stream=job.stream)
        for number in run.steps():
            shown: list[SampleRow] = []
            show = recipe.metrics.image_groups if run.observer.wants_images(number) else 0
            with run.timer("data"):
                images = next(job.stream).to(world.device)  # [B]
            for batch in images.parts(job.update.images_per_part):
                with run.timer("rollout"):
                    trajectory = job.rollout(batch)  # tokens [R, M, T]
                groups = trajectory.tokens.view(len(batch.class_ids), -1, trajectory.tokens.shape[-1])  # [B, G, T]
                wanted = 0 if shown else min(show, len(groups))
                decoded = job.reward.start(groups, batch.class_ids, batch.images, show=wanted, timer=run.timer)
                with run.timer("update"):
                    job.update.prepare(trajectory, job.reference)  # a GPU does this beside decoding
                rewards = decoded()
                credit(trajectory, rewards, job.reward, recipe=recipe, metrics=job.update.metrics)
                with run.timer("update"):
                    job.update(trajectory)
                if wanted:
                    real = recipe.rollout.mode == "teacher_forced"
                    shown = sample_rows(batch, rewards, job.stream.dataset.class_names, real=real)
            run.observer.images(number, shown)
            run.finish(
                number,
                job.update.metrics.means(),
                images=world.size * recipe.rollout.batch_size * recipe.rollout.num_generations,
                codes=job.policy.config.block_size,
                work=job.work,
            )


class Job(NamedTuple):
    """What a GRPO run works with."""

    stream: ImageStream
    policy: nn.Module
    reference: nn.Module | None
    rollout: Callable[[ImageBatch], Trajectory]
    reward: RewardSum
    update: PolicyUpdate
    work: Work


def build(recipe: GRPORecipe, world: World, timer: PhaseTimer) -> Job:
    """Data, models, rollout, rewards and update of a recipe."""
    training, objective = recipe.training, recipe.objective
    set_matmul_precision(training.mixed_precision)
    mesh = build_mesh(recipe.parallel, world)
    dataset = build_dataset(recipe.data, num_classes=recipe.model.num_classes)
    stream = build_stream(
        dataset,
        batch_size=recipe.rollout.batch_size,
        seed=training.seed,
        num_workers=recipe.data.num_workers,
        rank=world.rank,
        world_size=world.size,
    )
    tokenizer = build_tokenizer(recipe.tokenizer, device=world.device, seed=training.seed)
    codes = CodeCache(
        tokenizer.encode,
        num_images=len(dataset),
        codebook_size=recipe.tokenizer.codebook_size,
        enabled=recipe.data.cache_codes,
    ).codes
    policy = build_gpt(recipe, checkpoint=recipe.model.checkpoint, mesh=mesh, world=world).eval()
    reference = None
    if objective.kl_estimator != "none":
        checkpoint = objective.reference_checkpoint or recipe.model.checkpoint
        reference = build_gpt(recipe, checkpoint=checkpoint, mesh=mesh, world=world).eval().requires_grad_(False)
    update = build_update(recipe, policy, world)
    reward = build_rewards(
        recipe.reward,
        tokenizer,
        num_classes=recipe.model.num_classes,
        device=world.device,
        compile=recipe.compile,
        other_work=reference is not None or not update.on_policy,
    )
    rollout = build_rollout(
        policy,
        timer("encode")(codes),
        recipe.rollout,
        seed=training.seed,
        impl=training.kernels,
        keep_graph=update.shares_forward,
        with_real=objective.aux_ce_weight > 0,
        rollouts=training.steps,
    )
    work = grpo_work(recipe, policy.config, shares_forward=update.shares_forward)
    return Job(stream, policy, reference, rollout, reward, update, work)


def credit(
    trajectory: Trajectory, rewards: Rewards, reward: RewardSum, *, recipe: GRPORecipe, metrics: MetricSums
) -> None:
    """Give a trajectory its rewards and advantages [R, M], and note what they look like."""
    shape = trajectory.tokens.shape[:2]
    advantages = group_advantages(
        rewards.total,
        kind=recipe.objective.advantage,
        clip=recipe.objective.advantage_clip,
        components=rewards.components,
        component_weights=reward.weights,
    )
    trajectory.rewards, trajectory.advantages = rewards.total.view(shape), advantages.view(shape)
    metrics.add_values("reward", rewards.total)
    for name, values in zip(reward.names, rewards.components, strict=True):
        metrics.add_values(f"reward/{name}", values)
    spreadless = spreadless_groups(rewards.total)
    metrics.add("zero_spread", spreadless.sum(), spreadless.numel())
    if rewards.total.shape[1] > 1:
        metrics.add("group_std", rewards.total.std(dim=1).sum(), len(rewards.total))


def sample_rows(batch: ImageBatch, rewards: Rewards, class_names: Sequence[str], *, real: bool) -> list[SampleRow]:
    """Rows of the image grid: the real image (where the completions are of it), completions, rewards, class name."""
    return [
        (batch.images[i] if real else None, completions, rewards.total[i], class_names[int(batch.class_ids[i])])
        for i, completions in enumerate(rewards.images)
    ]


if __name__ == "__main__":
    run_main(main)
