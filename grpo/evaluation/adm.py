"""Metrics as ADM's evaluator computes them, where its arithmetic is not the plain one of `distances`.

Dhariwal & Nichol 2021, arXiv 2105.05233; `evaluations/evaluator.py` of openai/guided-diffusion. Its FID and sFID are
plain Fréchet distances, in fp64.
"""

import torch
from torch import Tensor

from grpo.evaluation import distances

_ROWS_AT_ONCE = 10_000
_SPLIT = 5000  # images


def inception_score(probabilities: Tensor) -> tuple[float, float]:
    """As `distances.inception_score`, over parts of 5,000 images in their order, the last maybe shorter."""
    return distances.score_of_parts(probabilities.double().split(_SPLIT))


def precision_recall(images: Tensor, reference: Tensor, *, nearest_k: int = 3) -> tuple[float, float]:
    """As `distances.precision_recall`, from squared distances in fp16 where those of a block are finite, else in fp32.

    Rounding matters: a squared distance of 200 between vectors of squared norm 400 is off by up to about 1.
    """
    radii_images, radii_reference = (_radii(side, nearest_k) for side in (images, reference))
    precise = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=images.device)
    for row in range(0, len(images), _ROWS_AT_ONCE):
        for column in range(0, len(reference), _ROWS_AT_ONCE):
            rows, columns = slice(row, row + _ROWS_AT_ONCE), slice(column, column + _ROWS_AT_ONCE)
            block = _squared_distances(images[rows], reference[columns])
            precise[rows] |= (block <= radii_reference[columns]).any(dim=1)
            recalled[columns] |= (block <= radii_images[rows, None]).any(dim=0)
    return precise.double().mean().item(), recalled.double().mean().item()


def _radii(features: Tensor, nearest_k: int) -> Tensor:
    """[N] fp32, the squared distance of each vector to its k-th nearest neighbour; itself is the first of k + 1."""
    assert len(features) > nearest_k, f"{len(features)} vectors have no {nearest_k} neighbours each"
    parts = features.split(_ROWS_AT_ONCE)
    rows_to_all = (torch.cat([_squared_distances(rows, columns) for columns in parts], dim=1) for rows in parts)
    return torch.cat([rows.kthvalue(nearest_k + 1, dim=1).values for rows in rows_to_all])


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """[N, M] fp32, rounded as the evaluator's graph rounds: norms, product and both sums to fp16 each."""
    first, second = first.float(), second.float()
    halves = _in_steps(first.half(), second.half())
    return halves.float() if halves.isfinite().all() else _in_steps(first, second)


def _in_steps(first: Tensor, second: Tensor) -> Tensor:
    """|u|² - 2 u·v + |v|², clipped at 0, each step in the dtype of the vectors; products accumulate in fp32."""
    dtype = first.dtype
    norms = [side.square().float().sum(dim=1).to(dtype) for side in (first, second)]
    product = (first.float() @ second.float().T).to(dtype)
    return (norms[0][:, None] - 2 * product + norms[1]).clamp_min(0)
