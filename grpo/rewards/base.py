"""What a reward is, what it is built from and what it sees."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from grpo.config import RewardTable
from grpo.config.types import Normalise
from grpo.models import ClassCondition, Condition, Generator, VQModel, WithoutAdapter

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class RewardContext:
    """What rewards are built from, besides their settings: the frozen tokenizer in `dtype`, class names by id."""

    tokenizer: VQModel
    device: torch.device
    dtype: torch.dtype
    class_names: Sequence[str]
    has_prompts: bool = False
    """Whether images are asked for by prompts, and not by classes."""
    generator: Callable[[str | None], Generator | WithoutAdapter] | None = None
    """Weights -> the frozen generator with them, sharded as the policy and built once; None are the policy's own."""
    real_images: Callable[[int], Iterable[Tensor]] | None = None
    """Number -> so many images of the data set at most, in batches [n, 3, H, W] fp32 in [-1, 1]: this rank's share."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What several rewards of a run use, such as one network, by a key that says what it is."""

    def prepare(self, network: Network) -> Network:
        """A network that rewards: on the device, frozen; a copy in `dtype` and tensor cores' layout unless fp32."""
        network = network.to(self.device).requires_grad_(False)
        if self.dtype == torch.float32:
            return network
        return copy.deepcopy(network).to(self.dtype).to(memory_format=torch.channels_last)


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

    @property
    def class_ids(self) -> Tensor:
        """[n] int64, where completions are asked to be of classes."""
        assert isinstance(self.condition, ClassCondition), "rewards that need classes are refused elsewhere"
        return self.condition.class_ids


class Reward:
    """One kind of reward: higher is better, one number a completion, no gradient.

    It depends on nothing but its own completion and that one's image, so that batches can be cut anywhere; a
    `PopulationReward` looks at all of them. What it needs of real images is computed from `real_images`, once each, and
    then indexed by `image_of`. It is built from its settings and the context, and raises a `UserError` whose lines
    begin with the key that is wrong.
    """

    Settings: ClassVar[type[RewardTable]] = RewardTable
    """The keys of its table [reward.NAME], where it has more than those that all have."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it cannot do without, checked with the recipe: "real_images" (the completion's own), "classes", "prompts",
    "population" (it looks at all completions of a rollout together), "generator" (a frozen one, whose weights the key
    `checkpoint` names; none are the policy's own start)."""
    networks: Sequence[nn.Module] = ()
    """To be compiled where the recipe compiles."""
    may_abstain: bool = False
    """Whether NaN says that it has no opinion; elsewhere NaN is a fault, and the step is skipped."""
    most_abstained: float = 1.0
    """Share of a step's completions: where it has no opinion of all, or of more than this, the step counts as bad."""
    bad_steps: int = 10
    """After so many bad steps in a row the run stops, with a checkpoint."""
    place: str = ""
    """Where code or a server of the user's own is, for messages."""

    @classmethod
    def check(cls, settings: Any, *, has_prompts: bool) -> None:
        """For a dry run: raises the `UserError` of what can be told without networks and images."""

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        raise NotImplementedError


class PopulationReward(Reward):
    """A reward of all completions of a rollout, of all ranks, together, such as a share in a distance of distributions.

    `state_tensors` is saved with a run's checkpoints and loaded in place.
    """

    needs = frozenset({"population"})

    def features(self, batch: DecodedBatch) -> Tensor:
        """What is kept of each completion until all are there: -> [n, D]."""
        raise NotImplementedError

    def score(self, features: Tensor) -> Tensor:
        """Features [N, D] of this rank's N completions -> [N]. Collective: all ranks come, with as many."""
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        """What it remembers of former steps: the live tensors by name, the same on every rank."""
        return {}


class Term(NamedTuple):
    """A reward's place in the whole, see `RewardTable`."""

    reward: Reward
    weight: float = 1.0
    normalise: Normalise = "none"
    separate: bool = False
