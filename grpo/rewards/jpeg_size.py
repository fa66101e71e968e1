"""How simple an image is: the fewer bytes it takes as a JPEG, the better."""

import io
from typing import Annotated

import torch
from annotated_types import Ge, Le
from PIL import Image
from torch import Tensor

from grpo.config import RewardTable
from grpo.models import to_uint8
from grpo.rewards.base import DecodedBatch, Reward, RewardContext

UNIT = 500  # kilobytes


class JPEGSize(Reward):
    """Minus the size of the image as a JPEG, in units of 500 kB (DDPO's compressibility, arXiv 2305.13301)."""

    class Settings(RewardTable):
        """Minus the size of the image as a JPEG, in units of 500 kB."""

        quality: Annotated[int, Ge(1), Le(100)] = 95
        """Quality of the JPEG."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.quality = settings.quality

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, below 0."""
        pixels = to_uint8(batch.images).permute(0, 2, 3, 1).cpu().numpy()
        kilobytes = []
        for image in pixels:
            Image.fromarray(image).save(file := io.BytesIO(), format="jpeg", quality=self.quality)
            kilobytes.append(file.tell() / 1000)
        return -torch.tensor(kilobytes, device=batch.images.device) / UNIT
