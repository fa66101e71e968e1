"""Read a picture by fitting the renderer: no network, exact on clean drawings.

What stands out of the background falls into connected parts. A part's colour is the nearest to its mean; then each
shape is fitted to the part's coverage by Gauss-Newton steps on centre and radius, from the part's own centroid and
area, and the shape with the smallest squared error is taken. A part that no shape fits is there, but has no name.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.shapes.rendering import EXTENT, coverage, middles, palette
from grpo.shapes.world import MOST_SEEN, NO, SHAPES, SIZES, Scenes

WORKING_SIZE = 32  # larger images are averaged down to this side
INSIDE = 0.45  # coverage from which on a pixel belongs to a part
SMALLEST_PART = 0.35  # share of the area of the smallest shape; what is smaller is dirt
LEAST_LIKENESS = 0.7  # of a part and the shape fitted to it: sum of minima over sum of maxima of both coverages
PROMISE = 4.0  # shapes whose error after a first step is at most so many times the best are fitted further
SMALLEST_RADIUS, LARGEST_RADIUS = SIZES["small"] * 0.6, SIZES["large"] * 1.35
_FINE = 256  # side of the drawings from which areas and centroids of the shapes are taken


class Fitting:
    """The reader: images -> scenes."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Scenes:
        """Images [N, 3, H, W] in [-1, 1], square, of any size -> what they show, at most `MOST_SEEN` shapes each."""
        images = (images.float().nan_to_num().clamp(-1, 1) + 1) / 2
        if images.shape[-1] > WORKING_SIZE:
            images = F.interpolate(images, size=(WORKING_SIZE, WORKING_SIZE), mode="area")
        share = _coverage_of_any(images)  # [N, S, S]
        labels = connected(share > INSIDE)
        rows, part_labels, slots = _parts(labels, share)
        found = Scenes(*(field.to(images.device) for field in Scenes.empty(len(images), MOST_SEEN)))
        if not len(rows):
            return found
        own = labels[rows] == part_labels[:, None, None]  # [M, S, S]
        colors = _colors(images[rows], own, share[rows])
        target = _coverage_of(colors, images[rows]) * _grown(own, others=(labels[rows] > 0) & ~own)
        shapes, radii, centers = fit(target)
        for field, values in zip(found, (shapes, colors, radii, centers), strict=True):
            field[rows, slots] = values
        return found


def connected(mask: Tensor) -> Tensor:
    """Connected parts of a mask [N, H, W] bool over its four neighbours: [N, H, W] int64, 0 outside, else the part's.

    Labels spread from pixel to pixel until nothing changes; a part has the largest label that was in it.
    """
    count = mask.shape[1:].numel()
    labels = torch.arange(1, count + 1, device=mask.device, dtype=torch.float32).view(1, *mask.shape[1:]) * mask
    while True:
        wide = F.pad(labels, (1, 1, 1, 1))
        around = torch.stack([wide[:, 1:-1, 1:-1], wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2],
                              wide[:, 1:-1, 2:]])  # fmt: skip
        spread = around.amax(0) * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def fit(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shape nearest to each coverage [M, S, S]: its place in SHAPES or NO [M], radius [M], centre [M, 2]."""
    size, pixel = target.shape[-1], 1 / target.shape[-1]
    grid, mass = middles(size, target.device), target.sum((1, 2)).clamp_min(1e-6)
    centroid = torch.stack([(target.sum(1) * grid).sum(1), (target.sum(2) * grid).sum(1)], -1) / mass[:, None]
    half = round(LARGEST_RADIUS * EXTENT * size) + 2  # all that matters lies in this window
    start = ((centroid * size).round().long() - half).clamp(0, max(0, size - 2 * half))  # [M, 2]
    steps = torch.arange(min(2 * half, size), device=target.device)
    columns, rows = start[:, :1] + steps, start[:, 1:] + steps  # [M, w]
    window = target[torch.arange(len(target), device=target.device)[:, None, None], rows[:, :, None], columns[:, None]]
    x, y = grid[columns][:, None].expand_as(window), grid[rows][:, :, None].expand_as(window)
    values = torch.empty(len(SHAPES), len(target), 3, device=target.device)  # x, y, radius
    errors = torch.empty(len(SHAPES), len(target), device=target.device)
    for shape in range(len(SHAPES)):
        area, offset = _moments(shape)
        radius = (mass * pixel**2 / area).sqrt().clamp(SMALLEST_RADIUS, LARGEST_RADIUS)
        first = torch.stack([centroid[:, 0], centroid[:, 1] - offset * radius, radius], -1)
        values[shape], errors[shape] = _gauss_newton(shape, first, window, x, y, pixel, steps=1)
    hopeful = errors <= PROMISE * errors.amin(0) + 0.5  # in squared pixels
    for shape in range(len(SHAPES)):
        some = hopeful[shape].nonzero()[:, 0]
        inside = window[some], x[some], y[some]
        values[shape, some], errors[shape, some] = _gauss_newton(shape, values[shape, some], *inside, pixel, steps=3)
    best, likeness = errors.argmin(0), torch.empty_like(mass)
    for shape in range(len(SHAPES)):
        some = (best == shape).nonzero()[:, 0]
        drawn = _drawn(shape, values[shape, some], x[some], y[some], pixel)
        both = torch.minimum(drawn, window[some]), torch.maximum(drawn, window[some])
        likeness[some] = both[0].sum((1, 2)) / both[1].sum((1, 2))
    chosen = values[best, torch.arange(len(target), device=target.device)]
    return torch.where(likeness >= LEAST_LIKENESS, best, NO), chosen[:, 2], chosen[:, :2]


def _drawn(shape: int, values: Tensor, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Coverage [M, w, w] of the shape with x, y and radius [M, 3]."""
    center_x, center_y, radius = (value[:, None, None] for value in values.unbind(-1))
    return coverage(shape, x - center_x, y - center_y, radius, pixel)


def _gauss_newton(
    shape: int, values: Tensor, window: Tensor, x: Tensor, y: Tensor, pixel: float, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Least squares of coverage - window over x, y and radius [M, 3], by differences of a tenth of a pixel.

    Returns the values after the steps and the squared error [M] there.
    """
    delta = 0.1 * pixel
    moves = delta * torch.eye(3, device=values.device)
    damping = 1e-3 * torch.eye(3, device=values.device)
    for _ in range(steps):
        drawn = _drawn(shape, values, x, y, pixel)
        moved = [_drawn(shape, values + move, x, y, pixel) - drawn for move in moves]
        slopes = torch.stack(moved, -1).flatten(1, 2) * (pixel / delta)  # [M, w², 3] per pixel moved
        residual = (window - drawn).flatten(1)[..., None]
        step = torch.linalg.solve(slopes.mT @ slopes + damping, slopes.mT @ residual)[..., 0].clamp(-1, 1)
        values = values + step * pixel
        values[:, 2] = values[:, 2].clamp(SMALLEST_RADIUS, LARGEST_RADIUS)
    return values, (window - _drawn(shape, values, x, y, pixel)).square().sum((1, 2))


@cache
def _moments(shape: int) -> tuple[float, float]:
    """Area of the shape of radius 1, in squared radii, and how far below the centre its centroid is, in radii."""
    grid = middles(_FINE) * 2 * EXTENT - EXTENT
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    drawn = coverage(shape, x, y, torch.ones(()), 2 * EXTENT / _FINE)
    return drawn.sum().item() * (2 * EXTENT / _FINE) ** 2, ((drawn * y).sum() / drawn.sum()).item()


def _coverage_of_any(images: Tensor) -> Tensor:
    """[N, S, S] how much of the colour that fits a pixel best is in it, in [0, 1]."""
    colors, background = palette(images.device)
    rays = colors - background  # [8, 3]
    apart = images - background.view(3, 1, 1)
    along = torch.einsum("nchw,kc->nkhw", apart, rays / rays.norm(dim=1, keepdim=True))  # length of each projection
    longest, best = along.max(1)  # the nearest ray is the one with the longest projection
    return (longest / rays.norm(dim=1)[best]).clamp(0, 1)


def _coverage_of(colors: Tensor, images: Tensor) -> Tensor:
    """[M, S, S] coverage, where a pixel of image m is a mixture of the background and of colour m."""
    known, background = palette(images.device)
    rays = (known - background)[colors]  # [M, 3]
    along = torch.einsum("mchw,mc->mhw", images - background.view(3, 1, 1), rays)
    return (along / rays.square().sum(1)[:, None, None]).clamp(0, 1)


def _colors(images: Tensor, own: Tensor, share: Tensor) -> Tensor:
    """[M] the colour nearest to the mean over a part's pixels [M, S, S], the fully covered ones where it has any."""
    colors, _ = palette(images.device)
    full = own & (share > 0.8)
    weights = torch.where(full.any((1, 2), keepdim=True), full, own).float()
    mean = torch.einsum("mchw,mhw->mc", images, weights) / weights.sum((1, 2))[:, None]
    return torch.cdist(mean, colors).argmin(1)


def _grown(own: Tensor, *, others: Tensor) -> Tensor:
    """[M, S, S] a part with two pixels around it, where its edge fades, except for what others hold."""
    wide = F.max_pool2d(own[:, None].float(), 5, stride=1, padding=2)[:, 0]
    return wide * ~others


def _parts(labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image [M], label [M] and place in the scene [M] of the largest parts of each image that are no dirt."""
    size, each = labels.shape[-1], labels.shape[1:].numel() + 1
    keys = labels + each * torch.arange(len(labels), device=labels.device)[:, None, None]
    inside = labels > 0
    keys, inverse = torch.unique(keys[inside], return_inverse=True)
    area = torch.zeros(len(keys), device=share.device).index_add_(0, inverse, share[inside])
    rows, found = keys // each, keys % each
    smallest = min(_moments(shape)[0] for shape in range(len(SHAPES))) * (SIZES["small"] * size) ** 2
    keep = area >= SMALLEST_PART * smallest
    rows, found, area = rows[keep], found[keep], area[keep]
    order = torch.argsort(rows * (size**2 + 1) - area)  # by image, the largest first
    rows, found = rows[order], found[order]
    first = torch.searchsorted(rows, rows)  # of each part's image
    slots = torch.arange(len(rows), device=rows.device) - first
    keep = slots < MOST_SEEN
    return rows[keep], found[keep], slots[keep]
