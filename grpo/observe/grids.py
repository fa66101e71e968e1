"""Images side by side, with what was thought of them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from grpo.data import to_image, to_uint8

MARGIN = 8
TEXT_HEIGHT = 18
MAX_COLUMNS = 16
BACKGROUND, FOREGROUND, BEST, WORST = "#ffffff", "#333333", "#15803d", "#b91c1c"


class SampleRow(NamedTuple):
    """One image of a rollout with its completions; images are in [-1, 1]."""

    real: torch.Tensor | None  # [3, H, W]; None where the condition is all there is
    completions: torch.Tensor  # [G, 3, H, W]
    rewards: torch.Tensor  # [G]
    caption: str


def sample_grids(folder: Path) -> list[tuple[int, Path]]:
    """The grids that a run has drawn into its folder samples/, with their steps, the oldest first."""
    found = [(re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in folder.glob("step-*.png")]
    return sorted((int(match[1]), path) for match, path in found if match)


def image_grid(images: torch.Tensor, *, columns: int, gap: int = 2) -> Image.Image:
    """Images [N, 3, H, W] in [-1, 1] (or uint8) as one picture, row by row, `gap` white pixels between them."""
    height, width = images.shape[-2:]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    picture = Image.new("RGB", size, BACKGROUND)
    for i, image in enumerate(images):
        picture.paste(_picture(image), (i % columns * (width + gap), i // columns * (height + gap)))
    return picture


def sample_grid(rows: Sequence[SampleRow]) -> Image.Image:
    """A labelled picture of rollouts: a line for each row with the real image, if any, then the completions.

    Each completion has its reward under it, the best one of its row in green and the worst in red where they differ.
    Small images are enlarged to about 96 pixels, large ones reduced to 256; at most 16 completions of a row are shown.
    """
    width = rows[0].completions.shape[-1]
    side = width * max(1, round(96 / width)) if width <= 256 else 256
    resampling = Image.Resampling.NEAREST if side >= width else Image.Resampling.LANCZOS
    lines = [_labelled(row) for row in rows]
    columns = max(len(tiles) for tiles in lines)
    row_height = side + 2 * TEXT_HEIGHT + MARGIN
    picture = Image.new("RGB", (MARGIN + columns * (side + MARGIN), MARGIN + len(rows) * row_height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for index, (row, tiles) in enumerate(zip(rows, lines, strict=True)):
        top = MARGIN + index * row_height
        draw.text((MARGIN, top), row.caption, fill=FOREGROUND, font=font)
        for column, (image, label, color) in enumerate(tiles):
            left = MARGIN + column * (side + MARGIN)
            picture.paste(_picture(image).resize((side, side), resampling), (left, top + TEXT_HEIGHT))
            draw.text((left, top + TEXT_HEIGHT + side + 1), label, fill=color, font=font)
    return picture


def _labelled(row: SampleRow) -> list[tuple[torch.Tensor, str, str]]:
    """The images of a row with the texts below them and their colours."""
    rewards = row.rewards.float().tolist()
    best, worst = max(rewards), min(rewards)
    colors = {best: BEST, worst: WORST} if best > worst else {}
    shown = list(zip(row.completions, rewards, strict=True))[:MAX_COLUMNS]
    real = [] if row.real is None else [(row.real, "real", FOREGROUND)]
    return real + [(image, f"{reward:.4g}", colors.get(reward, FOREGROUND)) for image, reward in shown]


def _picture(image: torch.Tensor) -> Image.Image:
    return to_image(image if image.dtype == torch.uint8 else to_uint8(image))
