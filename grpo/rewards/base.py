"""What a reward is, what it is built from and what it sees."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from grpo.config import RewardTable
from grpo.models import Condition, VQModel

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class RewardContext:
    """What rewards are built from, besides their settings: the frozen tokenizer in `dtype`, class names by id."""

    tokenizer: VQModel
    device: torch.device
    dtype: torch.dtype
    class_names: Sequence[str]

    def prepare(self, network: Network) -> Network:
        """A network that rewards: on the device, frozen; a copy in `dtype` and tensor cores' layout unless fp32."""
        network = network.to(self.device).requires_grad_(False)
        if self.dtype == torch.float32:
            return network
        return copy.deepcopy(network).to(dtype=self.dtype, memory_format=torch.channels_last)


@dataclass(frozen=True)
class DecodedBatch:
    """n completions of b images, decoded."""

    images: Tensor  # [n, 3, H, W] in [-1, 1] up to the decoder's overshoot, in the dtype of the networks that reward
    tokens: Tensor  # [n, T] int64
    condition: Condition  # n rows, what each completion was asked to be
    real_images: Tensor  # [b, 3, H, W] fp32 in [-1, 1], each once; of the same class, in teacher forcing the image
    image_of: Tensor  # [n] int64, the real image, and the caption, of each completion
    captions: Sequence[str] = ()  # b texts, what was asked for in words: a class name, or a prompt
    completion_ids: Tensor | None = None  # [n] int64, running numbers over the whole run and all ranks


class Reward:
    """One kind of reward: higher is better, one number a completion, no gradient.

    It depends on nothing but its own completion and that one's image, so that batches can be cut anywhere. What it
    needs of real images is computed from `real_images`, once each, and then indexed by `image_of`. It is built from
    its settings and the context, and raises a `UserError` whose lines begin with the key that is wrong.
    """

    Settings: ClassVar[type[RewardTable]] = RewardTable
    """The keys of its table [reward.NAME], where it has more than kind and weight."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it cannot do without, checked with the recipe: "real_images" (the completion's own), "classes", "prompts",
    "population" (it looks at all completions of a rollout together)."""
    networks: Sequence[nn.Module] = ()
    """To be compiled where the recipe compiles."""
    may_abstain: bool = False
    """Whether NaN says that it has no opinion; elsewhere NaN is a fault, and the step is skipped."""

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        raise NotImplementedError
