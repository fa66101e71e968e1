"""Inception v3 of 2015-12-05 and ADM's evaluator, written out plainly, to compare with."""

import warnings

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch.nn import functional as F


def features_of(weights, pixels):
    """Pooled features [B, 2048], spatial features [B, 2023] and unbiased logits [B, 1008] of uint8 [B, 3, H, W]."""
    rows, columns = (first_order_weights(size) for size in pixels.shape[-2:])
    x = torch.einsum("ph,bchw,qw->bcpq", rows, pixels.float(), columns)
    x = (x - 128) * 0.0078125

    def conv(x, name, stride=1, padding=0):
        """Convolution, batch norm in eval mode, ReLU."""
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, variance, scale, shift = (
            weights[f"{name}.bn.{part}"][None, :, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (variance + 0.001).sqrt() * scale + shift).clamp_min(0)

    def chain(x, block, *layers):
        for layer, stride, padding in layers:
            x = conv(x, f"{block}.{layer}", stride, padding)
        return x

    def mean_pool(x):
        """3 x 3, where at a border only what is inside counts."""
        ones = torch.ones_like(x[:1, :1])
        total, inside = (F.avg_pool2d(side, 3, stride=1, padding=1) for side in (x, ones))
        return total / inside

    x = conv(x, "Conv2d_1a_3x3", stride=2)
    x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
    x = F.max_pool2d(x, 3, stride=2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, stride=2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        branches = [
            conv(x, f"{block}.branch1x1"),
            chain(x, block, ("branch5x5_1", 1, 0), ("branch5x5_2", 1, 2)),
            chain(x, block, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)),
            conv(mean_pool(x), f"{block}.branch_pool"),
        ]
        x = torch.cat(branches, 1)
    branches = [
        conv(x, "Mixed_6a.branch3x3", stride=2),
        chain(x, "Mixed_6a", ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2, 0)),
        F.max_pool2d(x, 3, stride=2),
    ]
    x = torch.cat(branches, 1)
    wide, tall = (0, 3), (3, 0)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        first = conv(x, f"{block}.branch1x1")
        if block == "Mixed_6d":
            spatial = first.permute(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
        double = zip(("1", "2", "3", "4", "5"), (0, tall, wide, tall, wide), strict=True)
        branches = [
            first,
            chain(x, block, ("branch7x7_1", 1, 0), ("branch7x7_2", 1, wide), ("branch7x7_3", 1, tall)),
            chain(x, block, *((f"branch7x7dbl_{number}", 1, padding) for number, padding in double)),
            conv(mean_pool(x), f"{block}.branch_pool"),
        ]
        x = torch.cat(branches, 1)
    seven = (("branch7x7x3_1", 1, 0), ("branch7x7x3_2", 1, wide), ("branch7x7x3_3", 1, tall), ("branch7x7x3_4", 2, 0))
    branches = [
        chain(x, "Mixed_7a", ("branch3x3_1", 1, 0), ("branch3x3_2", 2, 0)),
        chain(x, "Mixed_7a", *seven),
        F.max_pool2d(x, 3, stride=2),
    ]
    x = torch.cat(branches, 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        three = conv(x, f"{block}.branch3x3_1")
        double = chain(x, block, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1))
        pooled = mean_pool(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, stride=1, padding=1)
        branches = [
            conv(x, f"{block}.branch1x1"),
            conv(three, f"{block}.branch3x3_2a", padding=(0, 1)),
            conv(three, f"{block}.branch3x3_2b", padding=(1, 0)),
            conv(double, f"{block}.branch3x3dbl_3a", padding=(0, 1)),
            conv(double, f"{block}.branch3x3dbl_3b", padding=(1, 0)),
            conv(pooled, f"{block}.branch_pool"),
        ]
        x = torch.cat(branches, 1)
    pooled = x.mean((2, 3))
    return pooled, spatial, pooled @ weights["fc.weight"].T


def first_order_weights(size):
    """[299, size]: TensorFlow 1's bilinear resize along one side, whose pixel centres are at whole numbers."""
    places = torch.arange(299) * (size / 299)
    low = places.floor().long()
    high = (low + 1).clamp_max(size - 1)
    weights = torch.zeros(299, size)
    weights.scatter_add_(1, low[:, None], (1 - (places - low))[:, None].float())
    return weights.scatter_add_(1, high[:, None], (places - low)[:, None].float())


def frechet(first, second):
    """Of (mean, covariance) pairs, by the matrix square root."""
    (mean, covariance), (other_mean, other) = first, second
    with warnings.catch_warnings(action="ignore"):  # of singular products, of which the trace is still right
        root = sqrtm(covariance @ other).real
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other) - 2 * np.trace(root)


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


def score(probabilities, split=5000):
    """Inception score of fp32 [N, K], parts in their order."""
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return np.mean(scores)


def half_distances(first, second):
    """[N, M] squared distances of fp32 vectors, every step rounded to fp16."""
    first, second = first.astype(np.float16), second.astype(np.float16)
    norms = [(side * side).astype(np.float32).sum(1).astype(np.float16) for side in (first, second)]
    product = (first.astype(np.float32) @ second.astype(np.float32).T).astype(np.float16)
    twice = np.float16(2) * product
    return np.maximum(norms[0][:, None] - twice + norms[1][None], np.float16(0)).astype(np.float32)


def precision_and_recall(images, reference):
    inside = [half_distances(images, reference), half_distances(reference, images)]
    radii = [np.partition(half_distances(side, side), 3, axis=1)[:, 3] for side in (images, reference)]
    precise = (inside[0] <= radii[1][None]).any(1)
    recalled = (inside[1] <= radii[0][None]).any(1)
    return precise.mean(), recalled.mean()
