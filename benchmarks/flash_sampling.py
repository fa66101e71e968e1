"""The peer of drawing from a projection: FlashSampling's idea (arXiv 2603.15854), a Gumbel draw inside the product.

Each program multiplies one tile of the head, adds Gumbel noise and leaves the largest score of each row and its place;
the largest of all tiles is an exact draw, and no logits reach memory. It has no log-probs, which GRPO needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_kernel(
    hidden_ptr, weight_ptr, best_ptr, token_ptr, N, seed,
    V: tl.constexpr, D: tl.constexpr, TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    columns = tl.program_id(0) * TILE_V + tl.arange(0, TILE_V)
    scores = tl.zeros((TILE_N, TILE_V), tl.float32)
    for start in range(0, D, TILE_D):
        k = start + tl.arange(0, TILE_D)
        inside = (k < D)[None, :]
        hidden = tl.load(hidden_ptr + rows[:, None] * D + k[None, :], mask=inside & (rows < N)[:, None], other=0.0)
        weight = tl.load(
            weight_ptr + columns[:, None] * D + k[None, :], mask=inside & (columns < V)[:, None], other=0.0
        )
        scores = tl.dot(hidden, tl.trans(weight), scores)
    uniform = tl.rand(seed, rows[:, None] * V + columns[None, :])
    scores -= tl.log(-tl.log(tl.maximum(uniform, 1e-10)) + 1e-20)
    scores = tl.where((columns < V)[None, :], scores, float("-inf"))
    best, place = tl.max(scores, axis=1, return_indices=True)
    tl.store(best_ptr + tl.program_id(0) * N + rows, best, mask=rows < N)
    tl.store(token_ptr + tl.program_id(0) * N + rows, place + tl.program_id(0) * TILE_V, mask=rows < N)


def draw(hidden: Tensor, weight: Tensor, seed: int = 0) -> Tensor:
    """One token [N] of each row of softmax(hidden [N, D] @ weight.T [D, V])."""
    (N, D), V = hidden.shape, len(weight)
    tile_n, tile_v = (16, 64) if N <= 16 else (64, 128)
    tiles = triton.cdiv(V, tile_v)
    best = torch.empty(tiles, N, device=hidden.device)
    tokens = torch.empty(tiles, N, dtype=torch.int32, device=hidden.device)
    tile_kernel[(tiles, triton.cdiv(N, tile_n))](
        hidden, weight, best, tokens, N, seed, V=V, D=D, TILE_N=tile_n, TILE_V=tile_v, TILE_D=64, num_warps=4
    )
    return tokens.gather(0, best.argmax(dim=0, keepdim=True))[0]
