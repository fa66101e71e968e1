"""Grids and the labelled rollouts."""

import numpy as np
import torch

from grpo.observe import SampleRow, image_grid, sample_grid


def test_image_grid_places_images_row_by_row():
    images = torch.stack([torch.full((3, 4, 5), value, dtype=torch.uint8) for value in (10, 20, 30)])
    grid = np.asarray(image_grid(images, columns=2, gap=1))
    assert grid.shape == (9, 11, 4)
    for part, value in ((grid[:4, :5], 10), (grid[:4, 6:], 20), (grid[5:, :5], 30)):
        assert (part == [value, value, value, 255]).all()
    assert not grid[5:, 6:, 3].any()  # no ground of its own
    assert not grid[4, :, 3].any()


def row(*, real, completions=3, side=32, rewards=None):
    images = torch.zeros(completions, 3, side, side)
    rewards = torch.arange(completions) if rewards is None else torch.tensor(rewards)
    return SampleRow(torch.ones(3, side, side) if real else None, images, rewards, "seven")


def tile(picture, column, *, side=96):
    """Pixels of a tile in the first row: margins of 8, a line of text of 18."""
    left = 8 + column * (side + 8)
    return np.asarray(picture)[26 : 26 + side, left : left + side, :3]


def test_a_row_has_the_real_image_first_then_the_completions():
    picture = sample_grid([row(real=True)])
    assert picture.size == (8 + 4 * 104, 8 + 96 + 2 * 18 + 8)
    assert (tile(picture, 0) == 255).all()
    assert all((tile(picture, column) == 128).all() for column in (1, 2, 3))


def test_without_real_images_there_is_no_column_for_them():
    assert sample_grid([row(real=False), row(real=False)]).size == (8 + 3 * 104, 8 + 2 * 140)


def test_rewards_are_written_and_the_extremes_colored():
    colored, equal = (
        np.asarray(sample_grid([row(real=False, rewards=rewards)]))[26 + 96 :]
        for rewards in ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    )
    green = ((colored[..., 1].astype(int) - colored[..., 0]) > 60) & (colored[..., 3] > 0)
    red = ((colored[..., 0].astype(int) - colored[..., 1]) > 60) & (colored[..., 3] > 0)
    assert red[:, :104].any()  # the first completion has the lowest reward
    assert green[:, 216:].any()  # the last one the highest
    assert not red[:, 104:].any()
    assert not green[:, :216].any()
    assert (equal[..., :3].min(axis=2) == equal[..., :3].max(axis=2)).all()  # grey only
    assert equal[..., :3].min() < 128
    assert equal[..., 3].max() == 255


def test_large_images_are_reduced_and_many_completions_cut():
    picture = sample_grid([row(real=True, completions=20, side=384)])
    assert picture.size[0] == 8 + 17 * (256 + 8)
