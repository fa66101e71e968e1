"""Kernels and copies of one whole step of rollout, update and optimizer, counted without a GPU.

python benchmarks/count_update.py --config published/vapi_xxl_384_one_gpu --json out.json

The recipe's own rollout, update and optimizer run on one process, with the model's number of blocks and parameters and
the recipe's number of micro-batches, but one image in each and a width of a few numbers: how many operations there are
does not depend on their sizes. Blocks are stand-ins of one operation forward and one backward, so that what is counted
is all that is launched around them; `count_compiled.py` counts what a block launches, and the sum is of both. An
operation that computes or copies counts as one launch, whatever a library makes of it (an AdamW step of GPT-XXL is one
here and 71 launches on an H100), and so does one of this project.
"""

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels of this project run on a CPU

import torch
from count_kernels import LaunchCounter
from torch import Tensor

from grpo.config import ActivationCheckpoint, Compile, GRPORecipe, load_recipe
from grpo.data import ImageBatch
from grpo.estimate import with_micro_batch
from grpo.models import GPT, MODEL_SPECS, ClassCondition
from grpo.models.gpt import Block
from grpo.parallel import GIB, build_mesh, distributed, parallelize
from grpo.rollout import build_draw, build_rollout
from grpo.training import PolicyUpdate, build_optimizer

COPIES = ("copy_", "_to_copy", "clone", "contiguous", "_foreach_copy_")
STAND_INS = ("block", "block_backward")
BOOKKEEPING = ("_record_function_enter_new", "_record_function_exit")  # launch nothing
READS = ("_local_scalar_dense",)  # of the host, which waits for the device
SMALL = {"dim": 32, "n_head": 2, "n_kv_head": None, "multiple_of": 32, "vocab_size": 64, "block_size": 4}


@torch.library.custom_op("count::block", mutates_args=())
def block_forward(x: Tensor) -> Tensor:
    """Stands in for a block's forward."""
    return x.clone()


@torch.library.custom_op("count::block_backward", mutates_args=())
def block_backward(grad: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Stands in for its backward: gradients of the input and of the weights."""
    return [grad.clone(), *(torch.full_like(weight, 1e-3) for weight in weights)]


class StandIn(torch.autograd.Function):
    """A block of one operation each way."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return torch.ops.count.block(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.count.block_backward(grad, ctx.saved_tensors))


def around_the_blocks(recipe: GRPORecipe, *, layers: int | None = None) -> dict[str, Counter]:
    """Operations outside of the blocks in a second step, when nothing is made for the first time: by phase, by name.

    `recipe` is teacher-forced, with one optimizer step a rollout, and has a micro-batch size.
    """
    images = math.ceil(recipe.rollout.batch_size / recipe.training.micro_batch_size)
    single = {"micro_batch_size": 1, "batch_size": images * recipe.rollout.num_generations}
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=single)})
    recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"batch_size": images})})
    sizes = replace(MODEL_SPECS[recipe.model.name].config(image_size=recipe.data.image_size), **SMALL)
    dropout = {"dropout": recipe.model.dropout, "class_dropout": recipe.model.class_dropout}
    sizes = replace(sizes, **dropout, n_layer=layers or sizes.n_layer)
    schedule = recipe.schedule(ranks=1)
    with distributed(600) as world:
        policy = GPT(sizes).eval()
        parallelize(
            policy,
            mesh=build_mesh(recipe.parallel, world),
            parallel=recipe.parallel,
            compile=Compile(),
            activation_checkpoint=ActivationCheckpoint(),
            training=recipe.training,
        )
        optimizer = build_optimizer(policy, recipe, world)
        drawing = {"draw": build_draw(recipe.rollout, seed=0, impl="triton"), "schedule": schedule}
        codes = torch.randint(0, sizes.vocab_size, (images, sizes.block_size))
        rollout = build_rollout(policy, lambda batch: codes[batch.sample_ids], recipe.rollout, **drawing)
        update = PolicyUpdate(policy, optimizer, objective=recipe.objective, rollout=recipe.rollout, **drawing)
        counters = {name: LaunchCounter() for name in ("rollout", "update", "optimizer")}
        take, ids = optimizer.step, torch.arange(images)
        batch = ImageBatch(torch.empty(images, 3, 0, 0), ClassCondition(ids % recipe.model.num_classes), ids)

        def step() -> None:
            for part in batch.parts(schedule.images_per_part):
                with counters["rollout"]:
                    trajectory = rollout(part)
                trajectory.advantages = torch.ones(trajectory.tokens.shape[:2])
                with counters["update"]:
                    update(trajectory)

        def optimizer_step() -> dict:
            before = counters["update"].launches.copy()
            result = take()
            counters["optimizer"].launches += counters["update"].launches - before
            counters["update"].launches = before
            return result

        def forward(block: Block, x: Tensor, text: None = None, cache: None = None, dropout: object = None) -> Tensor:
            return StandIn.apply(x, *block.parameters())

        with mock.patch.object(Block, "forward", forward), mock.patch.object(optimizer, "step", optimizer_step):
            step()
            for counter in counters.values():
                counter.launches.clear()
            step()
    return {name: counter.launches for name, counter in counters.items()}


def summary(counted: dict[str, Counter]) -> dict[str, dict[str, int]]:
    """By phase: launches around the blocks, copies among them, reads of the host, blocks forward and backward."""
    return {
        phase: {
            "around": sum(n for name, n in counter.items() if name not in (*READS, *STAND_INS, *BOOKKEEPING)),
            "copies": sum(counter[name] for name in COPIES),
            "reads": sum(counter[name] for name in READS),
            "blocks forward": counter["block"],
            "blocks backward": counter["block_backward"],
        }
        for phase, counter in counted.items()
    }


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--config", default="published/vapi_xxl_384_one_gpu")
    parser.add_argument("--layers", type=int, help="blocks in place of the model's")
    parser.add_argument("--memory", type=float, default=79.0, help="GiB of the GPU that the micro-batch is chosen for")
    options = parser.parse_args()
    recipe = load_recipe(GRPORecipe, ["--config", options.config])
    recipe = with_micro_batch(recipe, mesh=(1,), memory=round(options.memory * GIB))
    counted = around_the_blocks(recipe, layers=options.layers)
    results = {"micro_batch_size": recipe.training.micro_batch_size, "phases": summary(counted)}
    for phase, numbers in results["phases"].items():
        print(f"{phase}: " + ", ".join(f"{name} {number}" for name, number in numbers.items()))
        print("  " + ", ".join(f"{name} {number}" for name, number in counted[phase].most_common()))
    if options.json:
        options.json.write_text(json.dumps(results | {"operations": counted}, indent=1) + "\n")


if __name__ == "__main__":
    main()
