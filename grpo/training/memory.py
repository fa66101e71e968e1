"""How much memory a recipe takes on one GPU, from its sizes alone.

Activations are those that the backward of the GPT keeps. With D the width, F the feed-forward's, Q that of queries,
keys and values together and K that of queries and keys, H heads, e bytes of the dtype of the computation, a block keeps

    2 (4 D + 4 + 2 e D)      of two norms: the input in fp32, its scale, the result before and after the weight
    e (Q + K + D) + 4 H      of attention: the projection that the values are part of, turned queries and keys, the
                             result, the log-sum-exp of each head
    4 e F                    of the feed-forward

bytes for each row. With full recomputation it keeps its input, e D; with selective recomputation also the results of
matrix products and attention, e (Q + 4 D + 2 F) + 4 H; one block at a time then has all of it. The final norm and the
hidden states add 4 D + 4 + 2 e D a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo.config import GRPORecipe, PretrainRecipe
from grpo.models import GPT, GPTConfig, VQConfig, VQModel, get_tokenizer_spec
from grpo.parallel import compute_dtype
from grpo.parallel.memory import ShardedBytes, count_parameters, sharded_bytes
from grpo.rewards.networks import bytes_per_image, reward_dtype
from grpo.rollout.decoder import bytes_per_row
from grpo.rollout.teacher_forced import CHUNK_ELEMENTS
from grpo.training.build import gpt_config
from grpo.training.update import can_share_forward, optimizer_steps

_FP32 = 4
_LOG_PROB_CHUNK = 4 << 25  # bytes of the logits that `linear_token_log_probs` holds on a GPU
_GPU = torch.device("cuda")


@dataclass(frozen=True)
class RecipeMemory:
    """Bytes on one GPU: what stays for the whole step, and what the phases of a step have for themselves."""

    lasting: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int:
        """All that lasts, and the largest phase."""
        return sum(self.lasting.values()) + max(sum(phase.values()) for phase in self.phases.values())


def recipe_memory(recipe: GRPORecipe | PretrainRecipe, *, mesh: tuple[int, ...], memory: int) -> RecipeMemory:
    """The estimate for one of the ranks of a mesh.

    Sizes that the run chooses by the memory that is free (`rollout.max_rows = 0`, `reward.batch_size = 0`) are chosen
    for what a GPU of `memory` bytes has left. Not counted: the CUDA context, NCCL's buffers and the fragmentation of
    the allocator, for which a tenth of the GPU should stay free, and the images of a batch.

    Args:
        mesh: sizes of the mesh, see `mesh_shape`; the last one is that of the shards.
        memory: bytes of the GPU.
    """
    config = gpt_config(recipe)
    with torch.device("meta"):
        model = GPT(config)
    micro_batches = _micro_batches(recipe)
    placement = {
        "shard": mesh[-1],
        "ranks": mesh[0] * mesh[-1] if len(mesh) == 2 else mesh[0],
        "parallel": recipe.parallel,
        "training": recipe.training,
    }
    policy = sharded_bytes(model, **placement, optimizer=recipe.optimizer, accumulates=micro_batches > 1)
    lasting = {
        "weights": policy.parameters,
        "gradients": policy.gradients,
        "optimizer": policy.optimizer,
        "unreduced gradients": policy.unreduced,
    }
    if isinstance(recipe, GRPORecipe) and recipe.objective.kl_estimator != "none":
        lasting["reference"] = sharded_bytes(model, **placement, optimizer=None, accumulates=False).parameters
    lasting["tokenizer and rewards"] = _frozen_networks(recipe)
    update = _update_phase(recipe, config, policy)
    if isinstance(recipe, PretrainRecipe):
        return RecipeMemory(lasting, {"update": update})
    return _with_rollout(recipe, config, policy, lasting=lasting, update=update, memory=memory)


def activation_bytes(config: GPTConfig, rows: int, *, dtype: torch.dtype, mode: str) -> int:
    """What forward and backward of the GPT keep of `rows` rows, at the start of the last block's backward.

    Args:
        mode: of activation checkpointing.
    """
    element, width = dtype.itemsize, config.dim
    whole = block_bytes(config, dtype)
    heads = _FP32 * config.n_head
    kept = {
        "none": whole,
        "selective": element * (config.qkv_dim + 5 * width + 2 * config.ffn_dim) + heads,
        "full": element * width,
    }[mode]
    again = 0 if mode == "none" else whole - (kept if mode == "selective" else 0)  # of the block that is recomputed
    final = _FP32 * width + _FP32 + 2 * element * width
    moving = element * 2 * (config.ffn_dim + width)  # gradients inside of a block
    return rows * (config.n_layer * kept + again + final + moving)


def block_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """What one block keeps of one row for its backward, without recomputation."""
    element, width = dtype.itemsize, config.dim
    turned = (config.n_head + config.kv_heads) * config.head_dim
    norms = 2 * (_FP32 * width + _FP32 + 2 * element * width)
    attention = element * (config.qkv_dim + turned + width) + _FP32 * config.n_head
    return norms + attention + 4 * element * config.ffn_dim


def _micro_batches(recipe: GRPORecipe | PretrainRecipe) -> int:
    """Backward passes of one optimizer step."""
    training = recipe.training
    if isinstance(recipe, PretrainRecipe):
        return training.gradient_accumulation_steps
    completions, _ = optimizer_steps(recipe.rollout, training)
    forced = recipe.rollout.mode == "teacher_forced"
    shared = recipe.rollout.num_generations if forced else 1
    real = int(not forced and recipe.objective.aux_ce_weight > 0)  # of real images, at least
    return -(-completions // (shared * training.batch_size)) + real


def _update_rows(recipe: GRPORecipe | PretrainRecipe, config: GPTConfig) -> int:
    """Rows of one micro-batch."""
    sequences = recipe.training.batch_size
    if isinstance(recipe, GRPORecipe):
        rollout = recipe.rollout
        if rollout.mode == "teacher_forced":
            sequences = min(sequences, rollout.batch_size)
        elif rollout.cfg_scale != 1 and rollout.guidance_in_loss == "guided":
            sequences *= 2
    return sequences * config.block_size


def _update_phase(recipe: GRPORecipe | PretrainRecipe, config: GPTConfig, policy: ShardedBytes) -> dict[str, int]:
    dtype = compute_dtype(recipe.training.mixed_precision)
    rows = _update_rows(recipe, config)
    mode = recipe.activation_checkpoint.mode
    head = rows * config.dim * dtype.itemsize + config.vocab_size * config.dim * (_FP32 + dtype.itemsize)
    return {
        "gathered weights": policy.gathered,
        "reduction": policy.reduction,
        "activations": activation_bytes(config, rows, dtype=dtype, mode=mode),
        "logits": min(rows * config.vocab_size * _FP32, _LOG_PROB_CHUNK) + head,
    }


def _with_rollout(
    recipe: GRPORecipe,
    config: GPTConfig,
    policy: ShardedBytes,
    *,
    lasting: Mapping[str, int],
    update: dict[str, int],
    memory: int,
) -> RecipeMemory:
    """The phases of a GRPO step. Where rollout and update share a forward, activations wait through all of them."""
    rollout, reward = recipe.rollout, recipe.reward
    forced, length = rollout.mode == "teacher_forced", config.block_size
    dtype = compute_dtype(recipe.training.mixed_precision)
    shares = can_share_forward(recipe.objective, rollout) and optimizer_steps(rollout, recipe.training)[1] == 1
    waiting = {name: update[name] for name in ("gathered weights", "activations")} if shares else {}
    left = memory - sum(lasting.values()) - sum(waiting.values())
    tokenizer = _vq_config(recipe)
    if forced:
        logits = min(rollout.batch_size * length * config.vocab_size, CHUNK_ELEMENTS["cuda"]) * _FP32
        images = min(recipe.training.batch_size, rollout.batch_size)
        sampling = {**(waiting or {"gathered weights": policy.gathered}), "logits": logits}
        encoding = {"encoding": images * bytes_per_image(tokenizer, length, dtype=torch.float32)}
        phases = {"encode": encoding, "rollout": sampling}
    else:
        row = bytes_per_row(config, dtype=dtype, copies=1 if rollout.cfg_scale == 1 else 2)
        rows = rollout.batch_size * rollout.num_generations
        fitting = max(1, int(0.8 * (left - policy.gathered_whole)) // row)
        cache = row * min(rows, rollout.max_rows or fitting)
        phases = {"rollout": {"gathered weights": policy.gathered_whole, "cache": cache}}
    low = reward_dtype(reward.precision, _GPU)
    image = bytes_per_image(tokenizer, length, dtype=low)
    completions = rollout.batch_size * rollout.num_generations
    decoded = min(completions, reward.batch_size or max(1, int(0.5 * left) // image))
    phases["reward"] = {**waiting, "decoding": decoded * image}
    return RecipeMemory(lasting, {**phases, "update": update})


def _vq_config(recipe: GRPORecipe | PretrainRecipe) -> VQConfig:
    section = recipe.tokenizer
    return get_tokenizer_spec(section.name).config(
        codebook_size=section.codebook_size, codebook_embed_dim=section.codebook_embed_dim
    )


def _frozen_networks(recipe: GRPORecipe | PretrainRecipe) -> int:
    """Tokenizer in fp32, its copy in the precision of the rewards, and a classifier as large as its file."""
    with torch.device("meta"):
        parameters = count_parameters(VQModel(_vq_config(recipe)))
    total = _FP32 * parameters
    if isinstance(recipe, GRPORecipe):
        low = reward_dtype(recipe.reward.precision, _GPU)
        total += 0 if low == torch.float32 else low.itemsize * parameters
        classifier = recipe.reward.classifier_checkpoint
        if classifier is not None and recipe.reward.class_log_prob_weight and Path(classifier).is_file():
            total += Path(classifier).stat().st_size
    return total
