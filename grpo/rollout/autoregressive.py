"""True sampling: one token after the other with a static KV cache."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from grpo.config import Rollout
from grpo.data import ImageBatch
from grpo.kernels import sample_tokens
from grpo.parallel import free_memory, gathered
from grpo.rollout.compiled_blocks import CompiledBlocks
from grpo.rollout.decoder import Decoded, Decoder, Replay, bytes_per_row
from grpo.rollout.trajectory import Trajectory, real_rows

SEGMENT = 128  # steps that read the same part of the cache; each segment costs a GPU one capture
MEMORY_SHARE = 0.8  # of the free memory, for caches and logits


@torch.no_grad()
def decode(
    model: nn.Module,
    class_ids: Tensor,
    *,
    row_ids: Tensor,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    max_rows: int = 0,
    impl: str = "auto",
    blocks: Callable[[], AbstractContextManager] = nullcontext,
) -> Decoded:
    """Draw one completion of each condition.

    Cache, buffers and graphs live during this call only, and so do the parameters that FSDP2 gathers, at addresses of
    their own each time. Capturing anew costs about one step in `SEGMENT`.

    Args:
        model: a GPT; under FSDP2 its parameters are gathered once for the whole call.
        class_ids: [N] int64.
        row_ids: [N] int64, global numbers of the completions; their random numbers depend on nothing else.
        cfg_scale: classifier-free guidance, 1 is off.
        cfg_interval: guidance is switched off after this decode step (LlamaGen's `cfg_interval`); -1 keeps it on.
        temperature, top_k, top_p, seed: see `sample_tokens`.
        max_rows: completions decoded together; 0 is as many as fit into a GPU's memory, and all on a CPU.
        blocks: surrounds all steps but the first of a completion (`CompiledBlocks`).
    """
    draw = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, impl=impl)
    with gathered(model):
        rows, parts = _parts(len(class_ids), max_rows or _rows_in_memory(model, guided=cfg_scale != 1.0))
        padding = (0, rows * parts - len(class_ids))
        decoder = Decoder(model, rows, draw=draw, cfg_scale=cfg_scale, cfg_interval=cfg_interval)
        steps = _steps(decoder)
        drawn = []
        for part in zip(*(nn.functional.pad(ids, padding).split(rows) for ids in (class_ids, row_ids)), strict=True):
            decoder.start(*part)
            with blocks():
                for position in range(1, decoder.length):
                    steps[position // SEGMENT]()
            drawn.append(decoder.read())
    return Decoded(*(torch.cat(values)[: len(class_ids)] for values in zip(*drawn, strict=True)))


def _parts(total: int, most: int) -> tuple[int, int]:
    """(rows of a part, number of parts): the fewest parts of at most `most` rows, of equal size to share buffers."""
    parts = max(1, math.ceil(total / most))
    return math.ceil(total / parts), parts


def _rows_in_memory(model: nn.Module, *, guided: bool) -> int:
    """Completions whose caches fit beside what is in the memory of the model's GPU now."""
    weight = model.output.weight
    if weight.device.type != "cuda":
        return sys.maxsize
    row = bytes_per_row(model.config, dtype=weight.dtype, copies=2 if guided else 1)
    return max(1, int(free_memory(weight.device) * MEMORY_SHARE) // row)


def _steps(decoder: Decoder) -> list[Callable[[], None]]:
    """The decode steps of each segment; on a GPU they are replayed as CUDA graphs."""
    length = decoder.length
    steps = [partial(decoder.step, min(first + SEGMENT, length)) for first in range(0, length, SEGMENT)]
    if not decoder.row.is_cuda:
        return steps
    pool = torch.cuda.graph_pool_handle()
    return [Replay(step, pool) for step in steps]


def generate(
    model: nn.Module,
    class_ids: Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Codes [B, T] of one image for each of `class_ids` [B]; see `decode` for the arguments.

    An image depends on its class, the seed and its row id only (by default its place in `class_ids`), not on what is
    generated with it.
    """
    if row_ids is None:
        row_ids = torch.arange(class_ids.shape[0], device=class_ids.device)
    return decode(
        model,
        class_ids,
        row_ids=row_ids,
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        impl=impl,
    ).tokens


class AutoregressiveRollout:
    """G sampled completions of each image's class; a completion is its own context.

    Args:
        model: a GPT.
        encode: images -> codes [B, T], when real images are wanted too, for the auxiliary cross-entropy.
        config: the rollout section.
        seed: of the run.
        impl: backend of sampling.
        compiled: decode with compiled blocks, see `compilation_pays`.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Callable[[ImageBatch], Tensor] | None,
        config: Rollout,
        *,
        seed: int,
        impl: str,
        compiled: bool = False,
    ) -> None:
        self.model, self.encode, self.config, self.seed, self.impl = model, encode, config, seed, impl
        self.blocks = CompiledBlocks(model) if compiled else nullcontext

    def __call__(self, batch: ImageBatch) -> Trajectory:
        """[B] conditions -> Trajectory with R = B * G rows in groups of G, M = 1."""
        config = self.config
        group = torch.arange(config.num_generations, device=batch.class_ids.device)
        completion_ids = (batch.sample_ids[:, None] * config.num_generations + group).flatten()  # [B*G]
        class_ids = batch.class_ids.repeat_interleave(config.num_generations)
        tokens, log_probs, kept_mass = decode(
            self.model,
            class_ids,
            row_ids=completion_ids,
            cfg_scale=config.cfg_scale,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=self.seed,
            max_rows=config.max_rows,
            impl=self.impl,
            blocks=self.blocks,
        )
        truncated = config.top_k > 0 or config.top_p < 1.0
        return Trajectory(
            class_ids=class_ids,
            context=tokens[:, :-1],
            tokens=tokens[:, None],
            old_log_probs=log_probs[:, None],
            kept_mass=kept_mass[:, None] if truncated else None,
            completion_ids=completion_ids[:, None],
            real=None if self.encode is None else real_rows(batch.class_ids, self.encode(batch)),
        )
