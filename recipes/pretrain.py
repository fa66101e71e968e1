"""Next-token training of the generator on the codes of real images.

grpo pretrain --config quickstart/pretrain
torchrun --nproc_per_node=8 -m grpo pretrain --config quickstart/pretrain
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("pretrain")

from collections.abc import Sequence

from torch import Tensor

from grpo.config import PretrainRecipe, load_recipe
from grpo.data import ImageBatch, build_codes
from grpo.kernels import Dropout, linear_token_log_probs
from grpo.models import build_tokenizer
from grpo.parallel import World, distributed
from grpo.training import TrainingRun, build_data, build_generator, build_judge, build_optimizer, minimise


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, train."""
    recipe = load_recipe(PretrainRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        train(recipe, world)


def train(recipe: PretrainRecipe, world: World) -> None:
    """The whole job on this rank."""
    training = recipe.training
    with TrainingRun(recipe, world, title="Pre-training") as run:
        new = recipe.model.new_classes if recipe.model.checkpoint else 0  # of random weights all classes are new
        dataset = build_data(recipe, new_classes=new)
        tokenizer = None
        if recipe.needs_tokenizer or recipe.tokenizer.checkpoint is not None:
            tokenizer = build_tokenizer(recipe.tokenizer, device=world.device, seed=training.seed)
        length = (recipe.data.image_size // recipe.tokenizer.downsample_size) ** 2
        encode = build_codes(dataset, tokenizer, length=length, augmented=True, images=False)
        start = {"checkpoint": recipe.model.checkpoint, "class_names": dataset.class_names}
        model = build_generator(recipe, **start, mesh=run.mesh, world=world)

        def loss(batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
            with run.timer("encode"):
                codes = encode(batch)  # [B, T]
            with run.timer("forward"):
                dropout = Dropout(batch.sample_ids, seed=training.seed, impl=training.kernels)
                hidden = model.hidden(codes[:, :-1], batch.condition, dropout).flatten(0, 1)  # [B*T, D]
                log_probs, entropy = linear_token_log_probs(
                    hidden, model.output.weight, codes.view(-1, 1), return_entropy=True, impl=training.kernels
                )
            return -log_probs.mean(), {"entropy": entropy.mean()}

        judge = build_judge(recipe, model, tokenizer, dataset, world)
        minimise(run, model, dataset, loss, optimizer=build_optimizer(model, recipe, world), judge=judge)
