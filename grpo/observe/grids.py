"""Images side by side, with what was thought of them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from grpo.data import read_image, to_image, to_uint8

MARGIN = 8
TEXT_HEIGHT = 18
MAX_COLUMNS = 16
CAPTION_WIDTH = 160  # pixels of an image with its text below, at least
CAPTION_LINES = 4
LONGEST_CAPTION = 400  # characters of a text that are looked at
GAP = 2  # between images without words
# Grids have no ground of their own: their words are to be read on white and on black. Without transparency it is white.
TRANSPARENT, FOREGROUND, BEST, WORST = "#ffffff00", "#767676", "#16a34a", "#dc2626"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # the second where Pillow was built without FreeType


class SampleRow(NamedTuple):
    """One image of a rollout with its completions; images are in [-1, 1]."""

    real: torch.Tensor | None  # [3, H, W]; None where the condition is all there is
    completions: torch.Tensor  # [G, 3, H, W]
    rewards: torch.Tensor  # [G]
    caption: str


def sample_grids(folder: Path, kind: Literal["step", "judge"] = "step") -> list[tuple[int, Path]]:
    """The grids that a run has drawn into its folder samples/, with their steps, the oldest first.

    "step" are rollouts with their rewards, "judge" the same requests and random numbers every time.
    """
    found = [(re.fullmatch(rf"{kind}-(\d+)\.png", path.name), path) for path in folder.glob(f"{kind}-*.png")]
    return sorted((int(match[1]), path) for match, path in found if match)


def picture_of(path: Path) -> Image.Image:
    """The picture of a file in a run's folder; an empty one where it holds none.

    A run that was killed may have left half of one, and in the folder of somebody else a name may lead anywhere.
    """
    try:
        return read_image(path)
    except (OSError, ValueError):
        return Image.new("RGBA", (480, 12), TRANSPARENT)


def image_grid(images: torch.Tensor, *, columns: int, gap: int = GAP) -> Image.Image:
    """Images [N, 3, H, W] in [-1, 1] (or uint8) as one picture, row by row, `gap` transparent pixels between them."""
    height, width = images.shape[-2:]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    picture = Image.new("RGBA", size, TRANSPARENT)
    for i, image in enumerate(images):
        picture.paste(_picture(image), (i % columns * (width + gap), i // columns * (height + gap)))
    return picture


def captioned_grid(images: torch.Tensor, captions: Sequence[str], *, columns: int) -> Image.Image:
    """Images [N, 3, H, W] in [-1, 1] (or uint8) as one picture, row by row, each with its text under it.

    Small images are enlarged so that a few words fit into a line; a text has at most `CAPTION_LINES` of them.
    """
    factor = max(1, -(-CAPTION_WIDTH // images.shape[-1]))
    height, width = (side * factor for side in images.shape[-2:])
    columns, font = min(columns, len(images)), ImageFont.load_default(size=13)
    lines = [_wrapped(caption, width, font) for caption in captions]
    below = max(map(len, lines)) * TEXT_HEIGHT
    step = width + MARGIN, height + below + MARGIN
    picture = Image.new(
        "RGBA", (MARGIN + columns * step[0], MARGIN + -(-len(images) // columns) * step[1]), TRANSPARENT
    )
    draw = ImageDraw.Draw(picture)
    for number, (image, text) in enumerate(zip(images, lines, strict=True)):
        left, top = MARGIN + number % columns * step[0], MARGIN + number // columns * step[1]
        picture.paste(_picture(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for place, line in enumerate(text):
            draw.text((left, top + height + place * TEXT_HEIGHT), line, fill=FOREGROUND, font=font)
    return picture


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """The words in lines of so many pixels; what is left after the last line is cut off."""
    lines = [""]
    for word in text[:LONGEST_CAPTION].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = lines[:CAPTION_LINES]
    is_cut = len(lines) > len(kept) or len(text) > LONGEST_CAPTION
    return [*kept[:-1], _fitting(kept[-1] + ("..." if is_cut else ""), width, font)]


def _fitting(text: str, width: int, font: Font) -> str:
    """As much of a text as fits into so many pixels."""
    text = text[:LONGEST_CAPTION]
    if font.getlength(text) <= width:
        return text
    kept = next(length for length in range(len(text), -1, -1) if font.getlength(f"{text[:length]}...") <= width)
    return f"{text[:kept]}..."


def labelled_strips(strips: Sequence[tuple[str, Path]]) -> Image.Image:
    """PNG files under each other, each with its text above it; small ones are enlarged."""
    pictures = []
    for _, path in strips:
        picture = picture_of(path)
        factor = max(1, 960 // picture.width)
        size = (picture.width * factor, picture.height * factor)
        pictures.append(picture.convert("RGBA").resize(size, Image.Resampling.NEAREST))
    width = 2 * MARGIN + max(picture.width for picture in pictures)
    height = MARGIN + sum(picture.height + TEXT_HEIGHT + MARGIN for picture in pictures)
    whole = Image.new("RGBA", (width, height), TRANSPARENT)
    draw, font, top = ImageDraw.Draw(whole), ImageFont.load_default(size=13), MARGIN
    for (label, _), picture in zip(strips, pictures, strict=True):
        draw.text((MARGIN, top), label, fill=FOREGROUND, font=font)
        whole.paste(picture, (MARGIN, top + TEXT_HEIGHT))
        top += TEXT_HEIGHT + picture.height + MARGIN
    return whole


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
    picture = Image.new("RGBA", (MARGIN + columns * (side + MARGIN), MARGIN + len(rows) * row_height), TRANSPARENT)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for index, (row, tiles) in enumerate(zip(rows, lines, strict=True)):
        top = MARGIN + index * row_height
        draw.text((MARGIN, top), _fitting(row.caption, picture.width - 2 * MARGIN, font), fill=FOREGROUND, font=font)
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
