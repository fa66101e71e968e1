"""LlamaGen's top-k and top-p in plain torch, a part of the reference algorithm."""

import torch
from torch import Tensor


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, V] with -inf where top-k, then top-p leave a column out."""
    if top_k:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = torch.softmax(ordered, dim=-1).cumsum(dim=-1) - torch.softmax(ordered, dim=-1)
        logits = logits.masked_fill(
            torch.zeros_like(order, dtype=torch.bool).scatter(1, order, before > top_p), -torch.inf
        )
    return logits
