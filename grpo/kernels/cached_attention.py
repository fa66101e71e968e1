"""Attention of one new row of each sequence to the rows before it, which a cache holds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.dispatch import accumulation_dtype, use_triton

MAX_HEAD_DIM = 256


def cached_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, *, row: Tensor, rotary: Tensor,
    first_weight: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Turns the queries and keys of row `row`, appends keys and values to the cache, attends: [B, n_head * head_dim].

    Without gradient, and with nothing that depends on `row` on the host: the call can be replayed as a CUDA graph.
    The kernel reads the cache's filled part only. It cuts it into splits of a fixed size and merges them in order, so
    a sequence's result has the same bits in any batch and from run to run. Scores and sums are fp32; turned queries
    and keys are rounded to the cache's dtype.

    Args:
        qkv: [B, (n_head + 2 n_kv_head) * head_dim], a row's queries, keys and values, before the rotation.
        keys, values: [B, n_kv_head, length, head_dim] of qkv's dtype, rows 0 .. row - 1 filled; row `row` is written.
            Query head h reads key head h // (n_head / n_kv_head).
        row: [1] int64 on the device, which must be less than `length`; nobody looks.
        rotary: [rows, head_dim / 2, 2] fp32, cosine and sine of each row's angles, for neighbouring pairs.
        first_weight: [B] fp32, how many rows row 0 of the cache stands for, whose logarithm is added to its score. None
            is 1.

    Raises ValueError for wrong shapes or dtypes.
    """
    B, n_kv_head, _, head_dim = keys.shape
    heads, rest = divmod(qkv.shape[-1], head_dim)
    n_head = heads - 2 * n_kv_head
    if qkv.ndim != 2 or rest or n_head < 1 or n_head % n_kv_head or len(qkv) != B or head_dim % 2:
        raise ValueError(f"qkv {[*qkv.shape]} does not fit a cache of {[*keys.shape]}")
    if values.shape != keys.shape or {keys.dtype, values.dtype} != {qkv.dtype}:
        found = f"{[*keys.shape]} {keys.dtype} and {[*values.shape]} {values.dtype}"
        raise ValueError(f"keys and values must have one shape and the dtype {qkv.dtype}, not {found}")
    if row.shape != (1,) or row.dtype != torch.int64:
        raise ValueError(f"row must be [1] int64, not {[*row.shape]} {row.dtype}")
    if rotary.ndim != 3 or rotary.shape[1:] != (head_dim // 2, 2) or rotary.dtype != torch.float32:
        raise ValueError(f"rotary must be [rows, {head_dim // 2}, 2] fp32, not {[*rotary.shape]} {rotary.dtype}")
    if first_weight is not None and (first_weight.shape != (B,) or first_weight.dtype != torch.float32):
        raise ValueError(f"first_weight must be [{B}] fp32, not {[*first_weight.shape]} {first_weight.dtype}")
    return torch.ops.grpo.cached_attention(qkv.detach(), keys, values, row, rotary, first_weight, impl)


@torch.library.custom_op("grpo::cached_attention", mutates_args=("keys", "values"))
def _cached_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, row: Tensor, rotary: Tensor, first_weight: Tensor | None, impl: str
) -> Tensor:
    arguments = (qkv, keys, values, row, rotary, first_weight)
    obstacle = attention_obstacle(keys.dtype, keys.shape[3])
    if obstacle is None and not (qkv.stride(1) == keys.stride(3) == values.stride(3) == 1 and rotary.is_contiguous()):
        obstacle = "the elements of a head are not adjacent"
    if use_triton(impl, op="cached_attention", device=qkv.device, obstacle=obstacle):
        from grpo.kernels.triton_cached_attention import launch

        with torch.cuda.device_of(qkv):
            return launch(*arguments)
    return _reference(*arguments)


@_cached_attention.register_fake
def _(qkv, keys, *_):
    return qkv.new_empty(len(qkv), qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


def attention_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot take a cache of this dtype and head size; None if it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the cache is {dtype}"
    return None if head_dim <= MAX_HEAD_DIM else f"heads of {head_dim} do not fit in registers"


def _reference(
    qkv: Tensor, keys: Tensor, values: Tensor, row: Tensor, rotary: Tensor, first_weight: Tensor | None
) -> Tensor:
    _, n_kv_head, length, head_dim = keys.shape
    heads = qkv.unflatten(-1, (-1, head_dim))  # [B, n_head + 2 n_kv_head, head_dim]
    n_head = heads.shape[1] - 2 * n_kv_head
    turned, new_values = heads.split([n_head + n_kv_head, n_kv_head], dim=1)
    cos, sin = rotary.index_select(0, row)[0].unbind(-1)  # [head_dim / 2]
    even, odd = turned.to(accumulation_dtype(qkv)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(qkv)
    queries, new_keys = turned.split([n_head, n_kv_head], dim=1)
    keys.index_copy_(2, row, new_keys[:, :, None])
    values.index_copy_(2, row, new_values[:, :, None])
    rows = torch.arange(length, device=row.device)
    mask = (rows <= row)[None]  # [1, length]
    if first_weight is not None:
        weights = torch.where(rows == 0, first_weight.to(accumulation_dtype(qkv))[:, None], 1.0)
        mask = torch.where(mask, weights, 0.0).log()  # what is added to the scores
    attended = F.scaled_dot_product_attention(
        queries[:, :, None], keys, values, attn_mask=mask[:, None, None], enable_gqa=n_head != n_kv_head
    )
    return attended.flatten(1)
