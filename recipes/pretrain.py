"""Next-token training of the generator on the codes of real images.

python recipes/pretrain.py --config train_configs/quickstart/pretrain.toml
torchrun --nproc_per_node=8 recipes/pretrain.py --config train_configs/quickstart/pretrain.toml
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # recipes/grpo.py would be imported in place of the package grpo
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from grpo.config import PretrainRecipe, load_recipe
from grpo.data import CodeCache, build_dataset, build_stream
from grpo.kernels import linear_token_log_probs
from grpo.parallel import World, build_mesh, distributed, grad_scaler, gradient_sync, run_main, set_matmul_precision
from grpo.training import MetricSums, OptimizerStep, TrainingRun, build_gpt, build_tokenizer


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(PretrainRecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: PretrainRecipe, world: World) -> None:
    """The whole job on this rank."""
    training = recipe.training
    set_matmul_precision(training.mixed_precision)
    mesh = build_mesh(recipe.parallel, world)
    dataset = build_dataset(recipe.data, num_classes=recipe.model.num_classes)
    stream = build_stream(
        dataset,
        batch_size=training.batch_size * training.gradient_accumulation_steps,
        seed=training.seed,
        num_workers=recipe.data.num_workers,
        rank=world.rank,
        world_size=world.size,
    )
    tokenizer = build_tokenizer(recipe.tokenizer, device=world.device, seed=training.seed)
    encode = CodeCache(
        tokenizer.encode,
        num_images=len(dataset),
        codebook_size=recipe.tokenizer.codebook_size,
        enabled=recipe.data.cache_codes,
    ).codes
    model = build_gpt(recipe, checkpoint=recipe.model.checkpoint, mesh=mesh, world=world).train()
    step = OptimizerStep(
        model,
        recipe.optimizer,
        total_steps=training.steps,
        max_skipped_steps=training.max_skipped_steps,
        scaler=grad_scaler(training.mixed_precision, world.device),
    )
    metrics = MetricSums()

    with TrainingRun(recipe, world, title="Pre-training") as run:
        run.start(model=model, step=step, stream=stream)
        for number in run.steps():
            with run.timer("data"):
                images = next(stream).to(world.device)  # [B]
            parts = images.parts(training.batch_size)
            for index, batch in enumerate(parts):
                gradient_sync(model, index == len(parts) - 1)
                with run.timer("encode"):
                    codes = encode(batch)  # [B, T]
                with run.timer("forward"):
                    hidden = model.hidden(codes[:, :-1], batch.class_ids).flatten(0, 1)  # [B*T, D]
                    log_probs, entropy = linear_token_log_probs(
                        hidden, model.output.weight, codes.view(-1, 1), return_entropy=True, impl=training.kernels
                    )
                loss = -log_probs.mean()  # parts and ranks have the same number of tokens
                with run.timer("backward"):
                    step.backward(loss / len(parts))
                metrics.add("loss", loss)
                metrics.add("entropy", entropy.mean())
            for name, value in step().items():
                metrics.add(name, value)
            run.finish(number, metrics.means(), images=len(images.class_ids) * world.size)


if __name__ == "__main__":
    run_main(main)
