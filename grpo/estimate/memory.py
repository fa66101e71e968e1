"""How much memory a recipe takes on one GPU, from its sizes alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from grpo.config import (
    DistillRecipe,
    FinetuneRecipe,
    GeneratorRecipe,
    GRPORecipe,
    Parallel,
    Rewards,
    Schedule,
    Training,
)
from grpo.kernels import CHUNK_ELEMENTS, KEPT_ELEMENTS
from grpo.models import Generator, VQModel, generator_sizes, get_family, mark_trained, tokenizer_sizes
from grpo.parallel import (
    blocks_of,
    compute_dtype,
    mixed_precision_policy,
    moment_bytes,
    reshards_after_forward,
    shards_blocks,
)
from grpo.rewards.networks import MEMORY_SHARE as DECODING_SHARE
from grpo.rewards.networks import bytes_per_image, reward_dtype
from grpo.rollout.autoregressive import KEEP_MEMORY
from grpo.rollout.autoregressive import MEMORY_SHARE as SAMPLING_SHARE
from grpo.rollout.cached_sampler import bytes_per_sequence

FP32, GPU = torch.float32.itemsize, torch.device("cuda")
BLOCKS_IN_FLIGHT = 2  # the one that is computed, and the one that is gathered meanwhile


class ShardedBytes(NamedTuple):
    """Bytes on the rank that has the largest shards."""

    parameters: int  # shards of the fp32 weights
    gradients: int  # shards of their gradients, from the first reduction to the optimizer step
    optimizer: int  # shards of AdamW's moments
    trained: int  # of the shards, those that are trained, in fp32
    unreduced: int = 0  # gradients of the whole model that wait for a deferred reduction
    gathered: int = 0  # whole parameters as computed with, in a training step: the root's, and two blocks' or all
    gathered_whole: int = 0  # the same in a rollout that samples token by token: all parameters
    reduction: int = 0  # a block's whole gradient, and the buffer in which it is reduced
    backward: int = 0  # where all is one block, which is reduced when the activations are gone: its whole gradient


def sharded_bytes(
    model: nn.Module,
    *,
    mesh: tuple[int, ...],
    parallel: Parallel,
    training: Training,
    accumulates: bool,
    low_bit: bool = False,
) -> ShardedBytes:
    """What a trained model takes on one rank, after `parallelize`.

    Each parameter is cut along its first dimension into pieces of equal size; the last ones may be padding. Gradients
    and moments are of those that are trained.

    Args:
        model: blocks in `model.layers`; may be on the meta device, and is not yet parallelized.
        mesh: see `mesh_shape`; the last size is that of the ranks that share one copy of the model.
        accumulates: an optimizer step has more than one micro-batch.
        low_bit: AdamW's moments are in 8 bits.
    """

    def shard(parameter: nn.Parameter) -> int:
        return math.ceil(len(parameter) / mesh[-1]) * math.prod(parameter.shape[1:])

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lasting = {
        "parameters": FP32 * sum(map(shard, model.parameters())),
        "gradients": FP32 * sum(map(shard, trained)),
        "optimizer": sum(moment_bytes(p, shard(p), ranks=mesh[-1], low_bit=low_bit) for p in trained),
        "trained": FP32 * sum(map(shard, trained)),
    }
    policy = mixed_precision_policy(training.mixed_precision, training.grad_precision)
    ranks = math.prod(mesh)
    if ranks == 1 and policy.param_dtype is None:
        return ShardedBytes(**lasting)
    element, reduced = ((dtype or torch.float32).itemsize for dtype in (policy.param_dtype, policy.reduce_dtype))
    apart = shards_blocks(parallel, ranks=ranks)
    whole, blocks = count_parameters(model), [count_parameters(block) for block in blocks_of(model) if apart]
    root, largest = whole - sum(blocks), max(blocks, default=0)
    freed = reshards_after_forward(parallel, ranks=ranks)
    held = min(BLOCKS_IN_FLIGHT, len(blocks)) * largest if freed else sum(blocks)
    learned, of_blocks = count_trained(model), [count_trained(block) for block in blocks_of(model) if apart]
    return ShardedBytes(
        **lasting,
        unreduced=reduced * learned if accumulates and parallel.defer_gradient_sync else 0,
        gathered=element * (root + held),
        gathered_whole=element * whole,
        reduction=(element + reduced) * max([*of_blocks, learned - sum(of_blocks)]),
        backward=0 if apart else element * learned,
    )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class RecipeMemory(NamedTuple):
    """Bytes on one GPU: what stays for the whole step, and what the phases of a step have for themselves."""

    lasting: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peaks(self) -> dict[str, int]:
        """Of each phase, with all that lasts."""
        lasting = sum(self.lasting.values())
        return {name: lasting + sum(phase.values()) for name, phase in self.phases.items()}

    @property
    def peak(self) -> int:
        """All that lasts, and the largest phase."""
        return max(self.peaks.values())


def models_on_meta(recipe: GeneratorRecipe) -> tuple[Generator, VQModel]:
    """Generator, with what is trained of it, and tokenizer, without memory. Raises a UserError: sizes do not fit."""
    sizes = generator_sizes(recipe.model, recipe.tokenizer, image_size=recipe.data.image_size)
    with torch.device("meta"):
        model, tokenizer = get_family(recipe.model.name).build(sizes), VQModel(tokenizer_sizes(recipe.tokenizer))
        mark_trained(model, recipe.model, recipe.lora)
    return model, tokenizer


def recipe_memory(
    recipe: GeneratorRecipe, *, mesh: tuple[int, ...], memory: int, models: tuple[Generator, VQModel] | None = None
) -> RecipeMemory:
    """The estimate for one of the ranks of a mesh.

    Sizes that the run chooses by the memory that is free (`rollout.max_rows = 0`, `reward.batch_size = 0`) are chosen
    for what a GPU of `memory` bytes has left. Not counted: the CUDA context, NCCL's buffers and the fragmentation of
    the allocator, for which a tenth of the GPU should stay free, and the images of a batch.

    Args:
        mesh: see `mesh_shape`; its sizes multiply to the number of ranks.
        memory: bytes of the GPU.
        models: `models_on_meta(recipe)` where they are already there.

    Raises:
        UserError: sizes that do not fit together, or a batch that so many ranks cannot share.
    """
    training, ranks = recipe.training, math.prod(mesh)
    family, dtype = get_family(recipe.model.name), compute_dtype(training.mixed_precision)
    model, tokenizer = models or models_on_meta(recipe)
    sizes = model.config
    grpo = recipe if isinstance(recipe, GRPORecipe) else None
    schedule = None if grpo is None else grpo.schedule(ranks=ranks)
    sequences, micro_batches = _micro_batches(recipe, ranks=ranks)
    rows, texts = sequences * sizes.block_size, sequences // (schedule.rows_of_a_condition if schedule else 1)
    all_rows = family.costs.block_rows(sizes, sequences, texts=texts)
    logits = rows * sizes.vocab_size
    policy = sharded_bytes(
        model,
        mesh=mesh,
        parallel=recipe.parallel,
        training=training,
        accumulates=micro_batches > 1,
        low_bit=recipe.optimizer.name == "adamw_8bit",
    )
    lasting = {
        "weights": policy.parameters,
        "gradients": 0 if policy.unreduced else policy.gradients,  # else they take the place of the unreduced ones
        "optimizer": policy.optimizer,
        "unreduced gradients": policy.unreduced,
    }
    if training.ema_decay is not None:  # a reference that moves is a whole model
        moves = grpo and grpo.objective.kl_estimator != "none" and grpo.objective.reference == "ema"
        lasting["average"] = policy.parameters if moves else policy.trained
    stays_gathered = not reshards_after_forward(recipe.parallel, ranks=ranks)  # until an optimizer step frees it
    own = {recipe.model.checkpoint} if recipe.lora.rank else set()  # the model itself without its adapter
    if frozen := recipe.frozen_generators() - own:
        lasting["reference"] = len(frozen) * (policy.parameters + stays_gathered * policy.gathered)
    lasting["tokenizer and rewards"] = FP32 * count_parameters(tokenizer)
    mode, adapter = recipe.activation_checkpoint.mode, model.adapter
    update = {
        "gathered weights": policy.gathered,
        "whole gradients" if policy.backward else "reduction": policy.backward or policy.reduction,
        "activations": family.costs.activation_bytes(sizes, all_rows, dtype=dtype, mode=mode, adapter=adapter),
        "logits": FP32 * (logits if logits <= KEPT_ELEMENTS["cuda"] else CHUNK_ELEMENTS["cuda"])
        + family.costs.projection_bytes(sizes, rows, dtype=dtype, trained=model.output.weight.requires_grad)
        + dtype.itemsize * logits * (logits <= KEPT_ELEMENTS["cuda"]),  # their gradient lies beside them
    }
    ends = {"update": update}
    if policy.backward:
        ends["reduction"] = {"gathered weights": policy.gathered, "reduction": policy.reduction}
        ends["reduction"] |= {"gradients": policy.gradients} if policy.unreduced else {}
    if isinstance(recipe, DistillRecipe):
        update["teacher"] = FP32 * min(logits, CHUNK_ELEMENTS["cuda"]) + dtype.itemsize * rows * sizes.dim
        sampling, kept = _sampling(
            model, policy, rows=training.images // ranks, max_rows=recipe.distill.max_rows, guided=False, dtype=dtype,
            free=memory - sum(lasting.values()), kept=int(KEEP_MEMORY * memory),
        )  # fmt: skip
        update |= kept
        return RecipeMemory(lasting, {"rollout": sampling, **ends})
    if grpo is None or schedule is None:
        return RecipeMemory(lasting, ends)
    lasting["tokenizer and rewards"] += _reward_networks(grpo.reward, tokenizer)
    # Where rollout and update share a forward, what it keeps waits through the phases between.
    waits = ("gathered weights", "activations", *(("logits",) if logits <= KEPT_ELEMENTS["cuda"] else ()))
    waiting = {name: update[name] for name in waits if schedule.trains_sampling_forward}
    if stays_gathered and grpo.rollout.mode == "teacher_forced":
        waiting["gathered weights"] = policy.gathered
    free = memory - sum(lasting.values()) - sum(waiting.values())
    room = {"free": free, "kept": int(grpo.rollout.keep_memory * memory)}
    phases = _phases_before_update(grpo, schedule, model, tokenizer, policy, waiting=waiting, **room)
    update |= {name: phases["reward"][name] for name in ("kept sampler",) if name in phases["reward"]}
    return RecipeMemory(lasting, {**phases, **ends})


def rows_per_step(recipe: GeneratorRecipe, *, ranks: int) -> int:
    """Rows of an optimizer step on one rank, which `training.micro_batch_size` cuts into parts.

    Raises:
        UserError: a batch of GRPO that so many ranks cannot share.
    """
    if not isinstance(recipe, GRPORecipe):
        return max(1, recipe.training.images // ranks)
    schedule = recipe.schedule(ranks=ranks)
    share = schedule.group_size if recipe.rollout.mode == "teacher_forced" else 1  # completions of a row
    return max(1, schedule.completions_per_step // share)


def _micro_batches(recipe: GeneratorRecipe, *, ranks: int) -> tuple[int, int]:
    """(sequences of one forward of the update, backward passes of one optimizer step)."""
    copies, real, passes, sequences = 1, 0, 1, rows_per_step(recipe, ranks=ranks)
    most = recipe.training.micro_batch_size or sequences
    if isinstance(recipe, FinetuneRecipe) and recipe.finetune.loss == "cca":
        copies = 2  # both conditions
    if isinstance(recipe, GRPORecipe):
        schedule = recipe.schedule(ranks=ranks)
        passes = len(schedule.dropout_passes)
        if recipe.rollout.mode == "autoregressive":
            real = int(schedule.scores_targets)  # of real images, at least
            copies = 1 if recipe.rollout.loss_cfg_scale == 1 else 2
    return copies * min(most, sequences), passes * (math.ceil(sequences / most) + real)


def _phases_before_update(
    recipe: GRPORecipe,
    schedule: Schedule,
    model: Generator,
    tokenizer: VQModel,
    policy: ShardedBytes,
    *,
    waiting: Mapping[str, int],
    free: int,
    kept: int,
) -> dict[str, dict[str, int]]:
    """What encoding, rollout and reward have for themselves.

    `free` is what they may take, `kept` what sampling may keep through the update.
    """
    rollout, sizes, low = recipe.rollout, model.config, reward_dtype(recipe.reward.precision, GPU)
    image = bytes_per_image(tokenizer.config, sizes.block_size, dtype=low)
    decoded = recipe.reward.batch_size or max(1, int(DECODING_SHARE * free) // image)
    reward = {**waiting, "decoding": image * min(schedule.completions, decoded)}
    if rollout.mode == "teacher_forced":
        encoded = bytes_per_image(tokenizer.config, sizes.block_size, dtype=torch.float32) * schedule.images_per_part
        logits = FP32 * min(schedule.images_per_part * sizes.block_size * sizes.vocab_size, CHUNK_ELEMENTS["cuda"])
        sampling = {"logits": logits, **(waiting or {"gathered weights": policy.gathered})}
        return {"encode": {"encoding": encoded}, "rollout": sampling, "reward": reward}
    dtype, guided = compute_dtype(recipe.training.mixed_precision), rollout.cfg_scale != 1
    sampling, stays = _sampling(
        model, policy, rows=schedule.completions, max_rows=rollout.max_rows, guided=guided, dtype=dtype, free=free,
        kept=kept,
    )  # fmt: skip
    return {"rollout": sampling, "reward": reward | stays}


def _sampling(
    model: Generator,
    policy: ShardedBytes,
    *,
    rows: int,
    max_rows: int,
    guided: bool,
    dtype: torch.dtype,
    free: int,
    kept: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """What sampling `rows` sequences token by token takes, and what of it stays until the next time."""
    row, copy = bytes_per_sequence(model, dtype=dtype, guided=guided), dtype.itemsize * count_parameters(model)
    merges = copy <= kept or model.adapter is not None  # with an adapter there are matrices of their own
    weights = {"gathered weights": policy.gathered_whole, "copied weights": copy if merges else 0}
    fitting = max(1, int(SAMPLING_SHARE * (free - sum(weights.values()))) // row)
    cache = row * min(rows, max_rows or fitting)
    return {**weights, "cache": cache}, {"kept sampler": copy + cache} if copy + cache <= kept else {}


def _reward_networks(rewards: Rewards, tokenizer: VQModel) -> int:
    """The tokenizer's copy in the precision of the rewards, and networks as large as the files that tables name."""
    low = reward_dtype(rewards.precision, GPU)
    copy = 0 if low == torch.float32 else low.itemsize * count_parameters(tokenizer)
    paths = [Path(value) for table in rewards.active.values() for _, value in table if isinstance(value, str)]
    return copy + sum(path.stat().st_size for path in paths if path.is_file())
