"""GRPO of an autoregressive image generator: rollout -> reward -> advantage -> update.

python recipes/grpo.py --config train_configs/debug.toml
torchrun --nproc_per_node=8 recipes/grpo.py --config train_configs/vapi_xxl_384.toml
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # this file is named like the package that it imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from grpo.config import GRPORecipe, load_recipe
from grpo.data import CodeCache, ImageBatch, build_dataset, build_stream
from grpo.objectives import group_advantages, spreadless_groups
from grpo.observe import SampleRow
from grpo.parallel import World, build_mesh, distributed, grad_scaler, run_main, set_matmul_precision
from grpo.rewards import Rewards, RewardSum, build_rewards
from grpo.rollout import Trajectory, build_rollout
from grpo.training import (
    MetricSums,
    OptimizerStep,
    PolicyUpdate,
    TrainingRun,
    build_gpt,
    build_tokenizer,
    grpo_flops,
    optimizer_steps,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(GRPORecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: GRPORecipe, world: World) -> None:
    """The whole job on this rank."""
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
    _, steps_per_rollout = optimizer_steps(recipe.rollout, training)
    step = OptimizerStep(
        policy,
        recipe.optimizer,
        total_steps=training.steps * steps_per_rollout,
        max_skipped_steps=training.max_skipped_steps,
        scaler=grad_scaler(training.mixed_precision, world.device),
    )
    update = PolicyUpdate(policy, step, objective=objective, rollout=recipe.rollout, training=training, world=world)
    reward = build_rewards(
        recipe.reward,
        tokenizer,
        num_classes=recipe.model.num_classes,
        device=world.device,
        compile=recipe.compile,
    )
    images_per_part = training.batch_size if update.shares_forward else recipe.rollout.batch_size
    flops = grpo_flops(recipe, policy.config, shares_forward=update.shares_forward)

    with TrainingRun(recipe, world, title="GRPO") as run:
        rollout = build_rollout(
            policy,
            run.timer("encode")(codes),
            recipe.rollout,
            seed=training.seed,
            impl=training.kernels,
            keep_graph=update.shares_forward,
            with_real=objective.aux_ce_weight > 0,
        )
        run.start(model=policy, step=step, stream=stream)
        for number in run.steps():
            shown: list[SampleRow] = []
            show = recipe.metrics.image_groups if run.observer.wants_images(number) else 0
            with run.timer("data"):
                images = next(stream).to(world.device)  # [B]
            for batch in images.parts(images_per_part):
                with run.timer("rollout"):
                    trajectory = rollout(batch)  # tokens [R, M, T]
                with run.timer("reward"):
                    groups = trajectory.tokens.view(len(batch.class_ids), -1, trajectory.tokens.shape[-1])
                    wanted = min(show, len(groups)) * (not shown)
                    rewards = reward(groups, batch.class_ids, batch.images, show=wanted, timer=run.timer)
                    credit(trajectory, rewards, reward, recipe=recipe, metrics=update.metrics)
                with run.timer("update"):
                    if reference is not None:
                        trajectory.ref_log_probs = update.score(reference, trajectory)
                    update(trajectory)
                if show and not shown:
                    shown = sample_rows(
                        batch, rewards, dataset.class_names, real=recipe.rollout.mode == "teacher_forced"
                    )
            run.observer.images(number, shown)
            run.finish(
                number,
                update.metrics.means(),
                images=world.size * recipe.rollout.batch_size * recipe.rollout.num_generations,
                codes=policy.config.block_size,
                flops=flops,
            )


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
    metrics.add("group_std", rewards.total.std(dim=1).sum(), len(rewards.total))


def sample_rows(batch: ImageBatch, rewards: Rewards, class_names: Sequence[str], *, real: bool) -> list[SampleRow]:
    """Rows of the image grid: the real image (where the completions are of it), completions, rewards, class name."""
    return [
        (batch.images[i] if real else None, completions, rewards.total[i], class_names[int(batch.class_ids[i])])
        for i, completions in enumerate(rewards.images)
    ]


if __name__ == "__main__":
    run_main(main)
