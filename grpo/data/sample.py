"""Some images of a data set, for statistics over it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from grpo.data.dataset import ImageDataset, UnreadableImage
from grpo.models import normalize
from grpo.parallel import World

BATCH_SIZE = 64


def sample_images(dataset: ImageDataset, count: int, *, world: World) -> Iterator[Tensor]:
    """This rank's share of `count` images drawn without replacement, or of all where there are not more.

    Always the same ones, on any number of ranks. Unreadable images are counted by the data set and left out.
    Yields [n, 3, S, S] fp32 in [-1, 1] on the rank's device.
    """
    chosen = np.random.default_rng(0).permutation(len(dataset))[:count][world.rank :: world.size]

    def read(index: int) -> Tensor | None:
        try:
            return dataset.pixels(index)
        except UnreadableImage as error:
            dataset.record_unreadable(index, str(error))
            return None

    with ThreadPoolExecutor(max(1, dataset.data.num_workers)) as pool:  # decoders let other threads run meanwhile
        for start in range(0, len(chosen), BATCH_SIZE):
            indices = chosen[start : start + BATCH_SIZE].tolist()
            images = [image for image in pool.map(read, indices) if image is not None]
            if images:
                yield normalize(torch.stack(images).to(world.device))
