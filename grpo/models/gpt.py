"""LlamaGen's GPT over image codes (https://arxiv.org/abs/2406.06525), for a single device.

Parameter names and numerics are LlamaGen's own, so its released weights load strictly. A sequence has P + T - 1 rows:
the first P embed the condition (P is 1 for a class), the others the codes, and row P - 1 + t predicts code t.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.models.condition import CONDITION_PLACE, Condition, as_condition
from grpo.models.condition_rows import CaptionEmbedding, ClassEmbedding, TextRows, attend_evenly, text_mask, weigh_first
from grpo.models.generator import Dropout, Generator
from grpo.models.kv_cache import KVCache, LayerCache


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a GPT, and what does not count in a comparison: the rates of its dropouts, and names.

    Raises a ValueError if the sizes do not fit together.
    """

    dim: int  # width D
    n_layer: int  # transformer blocks
    n_head: int  # query heads; `dim / n_head` must be a multiple of 4 for the 2-D rotary positions
    n_kv_head: int | None = None  # key and value heads (grouped-query attention); None means `n_head`
    vocab_size: int = 16384  # image codes V
    block_size: int = 256  # codes of one image T, a square number
    num_classes: int = 1000  # class id `num_classes` is the unconditional slot, which always exists
    cls_token_num: int = 1  # condition rows P before the image; class-conditional models have exactly one
    caption_dim: int | None = None  # width C of text features; None is a class-conditional model
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None  # factor on the feed-forward width before rounding
    rope_base: float = 10000  # of the rotary frequencies
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    class_dropout: float = field(default=0.0, compare=False)  # share of rows that see the unconditional class
    dropout: float = field(default=0.0, compare=False)  # of embeddings, attention outputs and feed-forward outputs
    token_dropout: float | None = field(default=None, compare=False)  # of embeddings alone; None is `dropout`
    class_names: tuple[str, ...] | None = field(default=None, compare=False, metadata={"saved": True})  # by class id

    def __post_init__(self) -> None:
        if self.dim % (4 * self.n_head):
            raise ValueError(f"dim {self.dim} must be a multiple of 4 * n_head = {4 * self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.kv_heads}")
        if self.grid_size**2 != self.block_size:
            raise ValueError(f"block_size {self.block_size} must be a square number")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.num_classes} classes")
        if self.caption_dim is None and self.cls_token_num != 1:
            raise ValueError(f"cls_token_num is {self.cls_token_num}; a model without caption_dim has exactly 1")
        if self.caption_dim is not None and (self.cls_token_num < 1 or self.caption_dim < 1):
            raise ValueError(f"cls_token_num {self.cls_token_num} and caption_dim {self.caption_dim} must be positive")

    @property
    def embedding_dropout(self) -> float:
        """Rate of the dropout before the blocks."""
        return self.dropout if self.token_dropout is None else self.token_dropout

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def qkv_dim(self) -> int:
        """Width of queries, keys and values together."""
        return (self.n_head + 2 * self.kv_heads) * self.head_dim

    @property
    def grid_size(self) -> int:
        """Codes along each side of the image."""
        return round(self.block_size**0.5)

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU layer: 8/3 of `dim`, scaled, rounded up to a multiple of `multiple_of` (Llama's rule)."""
        width = int((self.ffn_dim_multiplier or 1) * int(8 * self.dim / 3))
        return -(-width // self.multiple_of) * self.multiple_of


EMBEDDINGS = 1  # place of dropout before the blocks, beside CONDITION_PLACE
ATTENTION, FEED_FORWARD = 0, 1  # and in each of them


def rotary_table(config: GPTConfig) -> Tensor:
    """Cosine and sine of the 2-D rotary angles, [1 + T, head_dim / 2, 2] in fp32 on the CPU.

    The first half of the pairs turns with the code's row in the image, the second half with its column. The row
    of the condition is all zeros, which blanks its query and key: LlamaGen's layout.
    """
    side, pairs = config.grid_size, config.head_dim // 4
    exponents = torch.arange(pairs, dtype=torch.float32, device="cpu") * 2 / (config.head_dim // 2)
    angles = torch.outer(torch.arange(side, device="cpu"), 1.0 / config.rope_base**exponents)  # [side, pairs]
    grid = torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], dim=1)  # [T, 2 * pairs]
    return F.pad(torch.stack([grid.cos(), grid.sin()], dim=-1), (0, 0, 0, 0, 1, 0))


class Rotary(nn.Module):
    """Turns queries and keys by the angles of their rows, in fp32.

    Every block has its own small table, because what is passed between blocks is rounded by mixed precision. The table
    is not part of the state dict and is rebuilt after every move of the module: `.to` a lower precision would round
    it, `to_empty` would leave garbage.
    """

    table: Tensor  # [1 + T, head_dim / 2, 2]

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("table", rotary_table(config), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # every `.to`, `.cuda` and `to_empty` passes here
        super()._apply(fn, recurse)
        self.table = rotary_table(self.config).to(self.table.device)
        return self

    def forward(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        """Turn the neighbouring pairs of each head of `x` [B, S, heads, head_dim], rows 0..S-1 or the one `row` [1]."""
        table = self.table[: x.shape[1]] if row is None else self.table.index_select(0, row)
        cos, sin = table[:, None].unbind(-1)  # [S, 1, head_dim / 2]
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32, scaled in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; with a cache, one row attends to the rows computed so far.

    The P rows of a text have no queries and keys, because their rotary table is zero: each attends evenly to the tokens
    up to itself, and every code gives each of the n tokens the weight exp(0). So for the codes the text is one row,
    with the mean of its values and the weight n, and their attention is that of a class-conditional model.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = (config.n_head, config.kv_heads)
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.dim, config.qkv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.rotary = Rotary(config)

    def forward(self, x: Tensor, text: TextRows | None = None, cache: LayerCache | None = None) -> Tensor:
        """x [B, S, D], or as `text` lays it out, where the first rows are not that of a class but a text's."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, S, n_head + 2 n_kv_head, head_dim]
        if text is None:
            return self.wo(self._attend(heads, cache).type_as(x))
        tokens, codes = text.split(heads)
        n_head, n_kv_head = self.heads
        attended, mean = attend_evenly(tokens[:, :, n_head + n_kv_head :], text.mask)
        first = F.pad(mean[:, None], (0, 0, n_head + n_kv_head, 0))  # [B, 1, heads, head_dim], the text as one row
        codes = torch.cat([text.for_each_row(first), codes], dim=1)
        weight = text.for_each_row(text.mask.sum(1))
        attended = attended.repeat_interleave(n_head // n_kv_head, dim=2).flatten(2)
        return self.wo(text.join(attended, self._attend(codes, cache, weight)[:, 1:]).type_as(x))

    def _attend(self, heads: Tensor, cache: LayerCache | None, weight: Tensor | None = None) -> Tensor:
        """[B, S, n_head * head_dim] of S rows; the first has the weight of `weight` [B] rows."""
        n_head, n_kv_head = self.heads
        turned, values = heads.split([n_head + n_kv_head, n_kv_head], dim=2)
        row = None if cache is None else cache.row
        turned, values = self.rotary(turned, row).transpose(1, 2), values.transpose(1, 2)  # [B, heads, S, head_dim]
        queries, keys = turned.split(self.heads, dim=1)
        mask = None
        if cache is not None:
            mask = cache.mask
            keys = cache.keys.index_copy_(2, cache.row, keys)
            values = cache.values.index_copy_(2, cache.row, values)
            if mask.is_floating_point() and not mask.is_cpu:  # GPUs want it in the dtype of keys, which would round it
                queries, keys, values = queries.to(mask.dtype), keys.to(mask.dtype), values.to(mask.dtype)
        elif heads.is_cpu:  # where the backward of bf16 attention takes four times as long as that of fp32
            queries, keys, values = queries.float(), keys.float(), values.float()
        if cache is None and weight is not None:
            queries, keys, values = weigh_first(queries, keys, values, weight)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.head_dim**-0.5,
            enable_gqa=n_head != n_kv_head,
        )  # fmt: skip
        return attended[..., : self.head_dim].transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block, the unit of compilation, sharding and activation checkpointing."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.rate = config.dropout

    def forward(
        self, x: Tensor, text: TextRows | None = None, cache: LayerCache | None = None, dropout: Dropout | None = None
    ) -> Tensor:
        """Arguments as in `Attention`."""
        attended = self.attention(self.attention_norm(x), text, cache)
        x = x + (attended if dropout is None else dropout(attended, self.rate, place=ATTENTION))
        fed = self.feed_forward(self.ffn_norm(x))
        return x + (fed if dropout is None else dropout(fed, self.rate, place=FEED_FORWARD))


class GPT(Generator):
    """Autoregressive transformer over the codes of one image, conditioned on its class or on a text.

    What it computes is the same in train and eval mode, and nothing of a rollout is module state. A forward has the
    dropouts of the config where it is given a `Dropout`, and none elsewhere.
    """

    config: GPTConfig
    forward_methods: ClassVar = ("hidden", "prefill", "extend")
    prefix_length: ClassVar = 1  # the whole condition

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if config.caption_dim is None:
            self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        else:
            self.cls_embedding = CaptionEmbedding(config.cls_token_num, config.caption_dim, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        for module in self.modules():  # fresh weights are drawn as LlamaGen's
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens: Tensor, condition: Condition | Tensor, dropout: Dropout | None = None) -> Tensor:
        """Logits of the next code after each row, [B, S + 1, V] fp32; row t predicts code t.

        Args:
            tokens: the image's first S codes, [B, S] integers, 0 <= S < T.
            condition: B rows, or class ids [B] in 0..num_classes, of which `num_classes` means no class.
            dropout: masks of the B rows.

        Raises a ValueError if a shape or dtype is wrong.
        """
        return self.output(self._hidden(tokens, condition, dropout)).float()

    def hidden(self, tokens: Tensor, condition: Condition | Tensor, dropout: Dropout | None = None) -> Tensor:
        """The rows that the output projection sees, [B, S + 1, D], after the final norm. Arguments as in `forward`."""
        return self._hidden(tokens, condition, dropout)

    def _hidden(self, tokens: Tensor, condition: Condition | Tensor, dropout: Dropout | None) -> Tensor:
        # Apart from `hidden`, because FSDP wraps the public methods and their hooks must not nest.
        condition, length = as_condition(condition), self.config.block_size
        if tokens.ndim != 2 or condition.rows != len(tokens):
            raise ValueError(f"tokens must be [B, S] for B conditions, not {[*tokens.shape]} for {condition.rows}")
        if tokens.shape[1] >= length:
            raise ValueError(f"{tokens.shape[1]} context tokens; the last of the {length} is never fed, only predicted")
        if tokens.is_floating_point():
            raise ValueError(f"tokens must be integers, not {tokens.dtype}")
        if dropout is not None and self.config.class_dropout:
            condition = condition.drop(dropout.rows(self.config.class_dropout, place=CONDITION_PLACE))
        x, text = self._embed(tokens, condition, shares=dropout is None)  # else sequences of one text drop differently
        if dropout is not None:
            x = dropout(x, self.config.embedding_dropout, place=EMBEDDINGS)
        masks = [None] * len(self.layers) if dropout is None else dropout.layers(len(self.layers))
        for layer, mask in zip(self.layers, masks, strict=True):
            x = layer(x, text, dropout=mask)
        if text is not None:
            tokens, codes = text.split(x)
            x = torch.cat([text.for_each_row(tokens[:, -1:]), codes], dim=1)
        return self.norm(x)

    def _embed(self, tokens: Tensor, condition: Condition, *, shares: bool) -> tuple[Tensor, TextRows | None]:
        """Inputs of the blocks; with `shares` those of a text are there once for the group of rows that has it."""
        codes, mask = self.tok_embeddings(tokens), text_mask(condition)
        if mask is None:
            return torch.cat([self.cls_embedding(condition), codes], dim=1), None
        group = condition.group if shares else 1
        if group > 1:
            condition = condition.one_of_each_group()
        text = TextRows(mask[::group], group)
        return text.join(self.cls_embedding(condition), codes), text

    def init_cache(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str, length: int | None = None
    ) -> KVCache:
        """An empty cache for `batch_size` sequences of `length` rows (default T), in the dtype of the computation."""
        config = self.config
        shape = (config.n_layer, batch_size, config.kv_heads, length or config.block_size, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVCache(keys, values, torch.ones(batch_size, device=device))

    def prefill(self, condition: Condition | Tensor, cache: KVCache) -> Tensor:
        """Start B sequences, one a row of `condition`; the hidden state that predicts code 0, [B, D].

        The rows of a text are computed in one forward, and leave one row in the cache, which is as in `extend`.
        """
        condition = as_condition(condition)
        x, mask = self.cls_embedding(condition), text_mask(condition)
        if mask is not None:
            cache.first_weight.copy_(mask.sum(1))
        text = None if mask is None else TextRows(mask, 1)
        return self._cached(x, torch.zeros((), dtype=torch.long, device=x.device), cache, text)

    def extend(self, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """Feed one code a sequence; the normed hidden state that predicts the next, [B, D], without gradients.

        Shapes are static and nothing waits for the device, so the step can be compiled or captured in a CUDA graph.

        Args:
            tokens: the codes number `position - 1`, [B] integers.
            position: 0-dim int64 on the model's device, the row being computed, 1 <= position < T.
            cache: from `init_cache`, filled up to that row by `prefill` and earlier calls; updated in place.

        Raises a ValueError if the cache is for another batch size.
        """
        return self._cached(self.tok_embeddings(tokens)[:, None], position, cache)

    @torch.no_grad()
    def _cached(self, x: Tensor, position: Tensor, cache: KVCache, text: TextRows | None = None) -> Tensor:
        if cache.keys.shape[1] != len(x):
            raise ValueError(f"the cache holds {cache.keys.shape[1]} sequences, the step {len(x)}")
        row, rows = position.view(1), torch.arange(cache.keys.shape[3], device=x.device)
        mask = (rows <= row)[None, None, None]
        if self.config.caption_dim is not None:
            weights = cache.first_weight.to(torch.promote_types(x.dtype, torch.float32))[:, None, None, None]
            mask = torch.where(mask, torch.where(rows == 0, weights, 1.0), 0.0).log()
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, text, LayerCache(keys, values, row, mask))
        return self.norm(x[:, -1])
