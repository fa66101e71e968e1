"""How good an image looks, without any reference, as MANIQA learned it."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from pydantic import FiniteFloat
from torch import Tensor
from torch.nn import functional as F

from grpo.config import RewardTable
from grpo.config.types import Wanted
from grpo.kernels import philox_uniform
from grpo.models import to_uint8
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.maniqa_network import MANIQA, without_unused
from grpo.rewards.published_weights import load_strictly, read_published, sizes_of

CROPS_AT_ONCE = 20  # of 224 pixels: 785 tokens each and maps of 3072 x 3072 between channels fill a GPU
CROP_STEP = 1 << 31  # in the place of a step in counters of random numbers: no draw of tokens has it


class MANIQAScore(Reward):
    """The mean quality of random crops, about 0 to 1. The crops depend on the number of the completion alone.

    An image whose sides are those of a crop is its own only crop, where the published code fails; one that is smaller
    is enlarged to that first.
    """

    class Settings(RewardTable):
        """Quality of the image by MANIQA."""

        checkpoint: Annotated[str, Wanted("ckpt_koniq10k.pt")]
        """`ckpt_koniq10k.pt` of MANIQA, or another of its files, or pyiqa's copies of them."""
        crops: Annotated[int, Ge(1)] = 20
        """Random crops of 224 pixels whose mean is taken."""
        scale: FiniteFloat = 0.8
        """Of the network's residual branches: 0.8 for the weights of KonIQ-10k and KADID-10k, 0.13 for PIPAL's."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.crops, self.dtype = settings.crops, context.dtype
        self.network = context.prepare(load_maniqa(settings.checkpoint, scale=settings.scale))
        self.networks = [self.network]

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        images, size = to_uint8(batch.images).float() / 127.5 - 1, self.network.size
        if (shorter := min(images.shape[-2:])) < size:
            sides = [size * side // shorter for side in images.shape[-2:]]
            images = F.interpolate(images, sides, mode="bilinear", align_corners=False)
        assert batch.completion_ids is not None, "a run numbers its completions"
        corners = self._corners(batch.completion_ids, images.shape[-2:]).tolist()
        images, crops_of_one = images.to(self.dtype), len(corners[0])
        per_batch = max(1, CROPS_AT_ONCE // crops_of_one)
        scores = []
        for start in range(0, len(images), per_batch):
            places = enumerate(corners[start : start + per_batch], start)
            crops = torch.stack([images[i, :, y : y + size, x : x + size] for i, of_one in places for y, x in of_one])
            scores.append(self.network(crops).unflatten(0, (-1, crops_of_one)).mean(dim=1))
        return torch.cat(scores)

    def _corners(self, ids: Tensor, sides: Sequence[int]) -> Tensor:
        """Row and column where the crops of completions `ids` [n] begin: [n, crops, 2] int64.

        As in the published code the last row and column are never reached, unless there is one place only.
        """
        spare = torch.tensor(sides, device=ids.device) - self.network.size
        if not spare.any():
            return ids.new_zeros(len(ids), 1, 2)
        drawn = philox_uniform(ids, 2 * self.crops, seed=0, step=CROP_STEP).unflatten(1, (self.crops, 2))
        return (drawn * spare).long()


def load_maniqa(checkpoint: str, *, scale: float) -> MANIQA:
    """The network. Raises a UserError: no such file, or not MANIQA's weights."""
    weights = without_unused(read_published(checkpoint))
    with sizes_of(checkpoint, what="MANIQA"):
        network = MANIQA(weights, scale=scale)
    load_strictly(network, weights, checkpoint, what="MANIQA")
    return network.eval()
