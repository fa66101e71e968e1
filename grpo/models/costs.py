"""What a GPT costs, by its sizes alone: floating-point operations, bytes that are kept, bytes that are read.

L layers of width D, F the feed-forward's width, Q that of queries, keys and values together, K that of queries and
keys, H heads, V codes, T of an image, P rows of a condition, S = P + T - 1 rows of a sequence, e bytes of a number in
the dtype of the computation.

Operations are those of matrix products, a multiply-add as two: L (2 S (D Q + D D + 3 D F) + 4 T T D) for one sequence
forward in the blocks, 2 T D V in the output projection, and twice as many backward. Attention counts all T x T scores,
as is usual (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B), although half of them are masked. A text is one row
there (see `Attention`): its P rows cost the other products, and less than a hundredth more where its features are
projected, which does not count. What is computed again only to save memory is no progress and does not count.

For its backward a block keeps of each row

    2 (4 D + 4 + 2 e D)      of two norms: the input in fp32, its scale, the result before and after the weight
    e (Q + K + D) + 4 H      of attention: the projection that the values are part of, turned queries and keys, the
                             result, the log-sum-exp of each head
    4 e F                    of the feed-forward

bytes. With full recomputation it keeps its input, e D; with selective recomputation also the results of matrix products
and attention, e (Q + 4 D + 2 F) + 4 H; one block at a time then has all of it.
"""

import torch

from grpo.formats import Adapter
from grpo.models.gpt import GPTConfig

FP32 = torch.float32.itemsize


def block_rows(config: GPTConfig, sequences: float, *, texts: float | None = None) -> float:
    """Rows that the blocks see of so many whole sequences, which share the rows of so many texts; None is one each."""
    return sequences * config.block_size + (sequences if texts is None else texts) * (config.cls_token_num - 1)


def blocks_flops(config: GPTConfig, sequences: float = 1, *, texts: float | None = None) -> float:
    """Forward operations of the blocks; arguments as in `block_rows`."""
    rows, scores = block_rows(config, sequences, texts=texts), sequences * config.block_size**2
    return config.n_layer * (2 * rows * _block_matrices(config) + 4 * scores * config.dim)


def projection_flops(config: GPTConfig, rows: float) -> float:
    """Forward operations of the output projection of `rows` hidden states to logits."""
    return 2 * rows * config.dim * config.vocab_size


def extension_bytes(config: GPTConfig, sequences: float, *, dtype: torch.dtype) -> float:
    """Bytes that sampling must read: T steps of `sequences` sequences together.

    A step computes little and reads all weights of blocks and projection once, and the keys and values of the rows so
    far of every sequence.
    """
    weights = config.n_layer * _block_matrices(config) + config.dim * config.vocab_size
    row = 2 * config.n_layer * config.kv_heads * config.head_dim  # keys and values
    filled = config.block_size * (config.block_size + 1) / 2
    return dtype.itemsize * (config.block_size * weights + sequences * row * filled)


def activation_bytes(
    config: GPTConfig, rows: int, *, dtype: torch.dtype, mode: str, adapter: Adapter | None = None
) -> int:
    """What is kept of `rows` rows at the start of the last block's backward, in a mode of activation checkpointing.

    An adapter keeps A x of each of its layers, and with selective recomputation B A x too.
    """
    element, width, heads = dtype.itemsize, config.dim, FP32 * config.n_head
    norm = FP32 * (width + 1) + 2 * element * width
    turned = (config.n_head + config.kv_heads) * config.head_dim
    low_rank = element * adapter.rank * len(adapter.targets) if adapter else 0
    whole = 2 * norm + element * (config.qkv_dim + turned + width + 4 * config.ffn_dim) + heads + low_rank
    products = element * sum(_outputs(config, name) for name in adapter.targets) if adapter else 0  # of B
    selective = element * (config.qkv_dim + 5 * width + 2 * config.ffn_dim) + heads + low_rank + products
    kept = {"none": whole, "selective": selective, "full": element * width}[mode]
    again = {"none": 0, "selective": whole - kept, "full": whole}[mode]  # of the block that is recomputed
    moving = element * 2 * (config.ffn_dim + width)  # gradients inside of a block
    return rows * (config.n_layer * kept + again + norm + moving)


def projection_bytes(config: GPTConfig, rows: int, *, dtype: torch.dtype, trained: bool = True) -> int:
    """What scoring `rows` hidden states makes beside their logits: gradients of the rows, and of the matrix twice."""
    matrix = config.vocab_size * config.dim * (FP32 + dtype.itemsize) if trained else 0
    return rows * config.dim * dtype.itemsize + matrix


def _outputs(config: GPTConfig, layer: str) -> int:
    """Width of what a linear layer of a block gives."""
    return {"wqkv": config.qkv_dim, "w1": config.ffn_dim, "w3": config.ffn_dim}.get(layer, config.dim)


def _block_matrices(config: GPTConfig) -> int:
    """Elements of the matrices of one block."""
    return config.dim * (config.qkv_dim + config.dim + 3 * config.ffn_dim)
