"""The cached forward of LlamaGen's GPT in fused kernels, with which a GPU samples. A block of up to 32 rows is

    norm_linear (wqkv), cached_attention, linear_add (wo), norm_linear (w1 and w3), linear_add (w2): 5 launches;

with more rows, where the library's products are better,

    add_rms_norm, wqkv, cached_attention, wo, add_rms_norm, w1 and w3 as one, silu_mul, w2: 8 launches,

or 9 where w1 and w3 are products of their own. The numbers are those of `GPT.extend` within rounding.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.kernels import (
    MAX_ROWS,
    add_rms_norm,
    attention_obstacle,
    cached_attention,
    linear_add,
    norm_linear,
    silu_mul,
    sums_of_squares,
    use_triton,
)
from grpo.models.cached_forward import CachedForward
from grpo.models.condition import Condition
from grpo.models.condition_rows import text_mask
from grpo.models.gpt import GPT, Block
from grpo.models.kv_cache import KVCache
from grpo.models.lora import whole_weight


class BlockWeights(NamedTuple):
    """The matrices and norms of one block."""

    attention_norm: Tensor
    wqkv: Tensor
    wo: Tensor
    ffn_norm: Tensor
    w1: Tensor
    w3: Tensor
    w2: Tensor


class FusedGPT(CachedForward):
    """`prefill` and `extend` of a GPT, without dropout. The rows of a text, computed together, are left to the model.

    Args:
        model: a GPT whose weights are whole.
        copies: compute with a copy of the weights at addresses of its own, in which w1 and w3 lie one after the other.
            `refresh` writes the model's weights into it, so that a CUDA graph outlives FSDP2's gathered parameters.
        impl: of the kernels.
    """

    model: GPT
    reads_filled_part = True
    few_rows = MAX_ROWS

    def __init__(self, model: GPT, *, copies: bool, impl: str = "auto") -> None:
        self.impl, self.copies, config = impl, copies, model.config
        self.eps, self.head_dim, self.ffn_dim = config.norm_eps, config.head_dim, config.ffn_dim
        blocks, others = _weights(model)
        if copies:
            blocks, others = map(_new_block, blocks), [torch.empty_like(weight) for weight in others]
        self.blocks, (self.embeddings, self.norm, self.output) = [*blocks], others
        self.after_text = config.caption_dim is not None
        self.rotary = _block(model.layers[0]).attention.rotary.table
        super().__init__(model)
        self.refresh()

    @property
    def weights(self) -> list[Tensor]:
        return [*chain(*self.blocks), self.embeddings, self.norm, self.output, self.rotary]

    @property
    def projection(self) -> Tensor:
        return self.output

    @torch.no_grad()
    def refresh(self) -> None:
        blocks, others = _weights(self.model)
        if self.copies:
            for own, block in zip(self.blocks, blocks, strict=True):  # one by one: an adapter makes new matrices
                torch._foreach_copy_([*own], [*block])
            torch._foreach_copy_([self.embeddings, self.norm, self.output], others)
        else:
            self.blocks, (self.embeddings, self.norm, self.output) = [*blocks], others

    @torch.no_grad()
    def prefill(self, condition: Condition, cache: KVCache) -> Tensor:
        if text_mask(condition) is not None:
            return super().prefill(condition, cache)
        embedding = self.model.cls_embedding(condition)  # [B, 1, D]
        return self._row(embedding[:, 0], torch.zeros(1, dtype=torch.int64, device=embedding.device), cache)

    @torch.no_grad()
    def extend(self, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        return self._row(F.embedding(tokens, self.embeddings), position.view(1), cache)

    def _row(self, x: Tensor, row: Tensor, cache: KVCache) -> Tensor:
        """Embeddings of one row of each sequence [B, D] -> normed hidden states [B, D]."""
        blocks = self._few_rows if len(x) <= self.few_rows else self._many_rows
        x, residual = blocks(x, row, cache)
        return add_rms_norm(x, residual, self.norm, eps=self.eps, impl=self.impl)[0]

    def _few_rows(self, x: Tensor, row: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """All blocks, by products that compute what stands around them."""
        squares = sums_of_squares(x)
        settings: dict[str, Any] = {"eps": self.eps, "impl": self.impl}
        for block, keys, values in self._layers(cache):
            qkv = norm_linear(x, squares, block.attention_norm, block.wqkv, **settings)
            attended = self._attend(qkv, keys, values, row, cache)
            x, squares = linear_add(attended, block.wo, x, impl=self.impl)
            gated = norm_linear(x, squares, block.ffn_norm, block.w1, block.w3, **settings)
            x, squares = linear_add(gated, block.w2, x, impl=self.impl)
        return x, None

    def _many_rows(self, x: Tensor, row: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """All blocks, by the library's products. The last one is still to be added to the residual."""
        residual: Tensor | None = None
        settings: dict[str, Any] = {"eps": self.eps, "impl": self.impl}
        for block, keys, values in self._layers(cache):
            normed, residual = add_rms_norm(x, residual, block.attention_norm, **settings)
            attended = self._attend(F.linear(normed, block.wqkv), keys, values, row, cache)
            normed, residual = add_rms_norm(F.linear(attended, block.wo), residual, block.ffn_norm, **settings)
            x = F.linear(silu_mul(*self._gate_and_up(normed, block), impl=self.impl), block.w2)
        return x, residual

    def _layers(self, cache: KVCache) -> Iterator[tuple[BlockWeights, Tensor, Tensor]]:
        """Each block's weights, keys and values."""
        return zip(self.blocks, cache.keys, cache.values, strict=True)

    def _attend(self, qkv: Tensor, keys: Tensor, values: Tensor, row: Tensor, cache: KVCache) -> Tensor:
        weight = cache.first_weight if self.after_text else None
        return cached_attention(qkv, keys, values, row=row, rotary=self.rotary, first_weight=weight, impl=self.impl)

    def _gate_and_up(self, x: Tensor, block: BlockWeights) -> tuple[Tensor, Tensor]:
        if self.copies:  # w3 follows w1
            both = block.w1.as_strided((2 * self.ffn_dim, x.shape[1]), block.w1.stride())
            return F.linear(x, both).split(self.ffn_dim, dim=1)
        return F.linear(x, block.w1), F.linear(x, block.w3)


def cached_forward(model: GPT, *, impl: str, copies: bool) -> CachedForward:
    """In fused kernels where they run (see `impl` in `grpo.kernels`), else the model's own.

    Raises a ValueError where `impl` is "triton" and they do not.
    """
    weight, config = model.output.weight, model.config
    obstacle = attention_obstacle(weight.dtype, config.head_dim)
    if use_triton(impl, op="the cached forward", device=weight.device, obstacle=obstacle):
        return FusedGPT(model, copies=copies, impl=impl)
    return CachedForward(model)


def _weights(model: GPT) -> tuple[Iterator[BlockWeights], list[Tensor]]:
    """Those of the blocks; embeddings of the codes, last norm and projection."""
    others = [model.tok_embeddings.weight, model.norm.weight, model.output.weight]
    blocks = (BlockWeights(*_block_weights(_block(layer))) for layer in model.layers)
    return blocks, [weight.detach() for weight in others]


def _block(layer: nn.Module) -> Block:
    assert isinstance(layer, Block)
    return layer


def _block_weights(block: Block) -> Iterator[Tensor]:
    attention, feed_forward = block.attention, block.feed_forward
    yield block.attention_norm.weight.detach()
    yield from (whole_weight(linear) for linear in (attention.wqkv, attention.wo))
    yield block.ffn_norm.weight.detach()
    yield from (whole_weight(linear) for linear in (feed_forward.w1, feed_forward.w3, feed_forward.w2))


def _new_block(block: BlockWeights) -> BlockWeights:
    """Memory for a copy, w1 and w3 in one piece."""
    new = {name: torch.empty_like(weight) for name, weight in block._asdict().items() if name not in ("w1", "w3")}
    w1, w3 = torch.cat([block.w1, block.w3]).chunk(2)
    return BlockWeights(w1=w1, w3=w3, **new)
