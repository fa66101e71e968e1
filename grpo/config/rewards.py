"""The kinds of rewards, the section [reward] and its tables [reward.NAME], each typed by its kind."""

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, SerializeAsAny, model_validator

from grpo.config.errors import UserError, did_you_mean
from grpo.config.types import MayChange, NonNegativeInt, Normalise, Section, Wanted, Weight

REWARD_KINDS: dict[str, str] = {
    "reconstruction": "grpo.rewards.reconstruction:Reconstruction",
    "embedding_cosine": "grpo.rewards.embedding_cosine:EmbeddingCosine",
    "class_log_prob": "grpo.rewards.class_log_prob:ClassLogProb",
    "feature_distance": "grpo.rewards.feature_distance:FeatureDistance",
    "log_ratio": "grpo.rewards.log_ratio:LogRatio",
    "loo_fid": "grpo.rewards.loo_fid:LeaveOneOutFID",
    "lpips": "grpo.rewards.lpips:PerceptualSimilarity",
    "patchgan": "grpo.rewards.patchgan:PatchGAN",
    "jpeg_size": "grpo.rewards.jpeg_size:JPEGSize",
    "shapes": "grpo.rewards.shapes:ShapesReward",
    "clip": "grpo.rewards.clip:CLIP",
    "hps_v2": "grpo.rewards.hps_v2:HPSv2",
    "pick_score": "grpo.rewards.pick_score:PickScore",
    "image_reward": "grpo.rewards.image_reward:ImageReward",
    "aesthetic": "grpo.rewards.aesthetic:Aesthetic",
    "maniqa": "grpo.rewards.maniqa:MANIQAScore",
    "http": "grpo.rewards.http_scorer:HTTPScorer",
    "python": "grpo.rewards.python_function:PythonFunction",
}
"""Kind -> module and class, imported only when a recipe asks for it. A new reward is one file and one line here."""

REFERENCE_REWARD = "reconstruction"
"""The reference trainer's reward, where a recipe names none: minus the squared error."""


def reward_kinds() -> dict[str, str]:
    """The project's kinds, and those of installed packages under the entry point group `grpo.rewards`."""
    return {entry.name: entry.value for entry in entry_points(group="grpo.rewards")} | REWARD_KINDS


def reward_class(kind: str) -> Any:
    """The class of a kind: `Settings` (a `RewardTable`), `needs`, and how to build it.

    Raises:
        UserError: there is no such kind, or its module cannot be imported.
    """
    kinds = reward_kinds()
    if kind not in kinds:
        raise UserError(f'unknown kind of reward "{kind}"; {did_you_mean(kind, kinds)}')
    module, _, name = kinds[kind].partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f'the reward "{kind}" cannot be imported from {kinds[kind]}: {error}') from error


class RewardTable(Section):
    """What every reward's table [reward.NAME] has; a kind adds keys of its own."""

    path_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys whose value is FILE or FILE:NAME, relative to the folder of the recipe's file; loaded they are absolute."""

    kind: str
    """What is rewarded; the table's own name unless given."""
    weight: Weight = 1.0
    """Its weight in the sum of rewards; 0 switches it off."""
    normalise: Normalise = "none"
    """Before its weight: group makes its mean 0 and its spread 1 among the completions of one image, batch among all
    completions of a rollout on all ranks, none leaves it as it is."""
    separate: bool = False
    """Give it an advantage of its own, added to that of the sum of the others with its weight, instead of a place in
    the sum. Then normalise says which advantage: none is the one of objective.advantage."""

    def resolved(self) -> Self:
        """The table as it is saved with a run; a kind that depends on files may note their hashes or refuse them.

        Raises:
            UserError: a file is missing, or is not the one that was noted.
        """
        return self

    def image_uses(self) -> Iterator[str]:
        """A line for each key that would have to be otherwise with a data set without images, beginning with it."""
        yield from ()

    def size_problems(self, *, image_size: int, completions: int) -> Iterator[str]:
        """What is wrong with images of this side, or with so many completions a step, a line each."""
        yield from ()


class Rewards(Section):
    """The weighted sum of rewards of one completion; each reward is a table of its own, [reward.NAME]."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, SerializeAsAny[RewardTable]] = Field(init=False)  # the tables

    batch_size: Annotated[NonNegativeInt, MayChange] = 64
    """Completions decoded and scored at once on each rank; 0 is what fits into a GPU's memory, and 64 on a CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the decoder and the networks that reward; auto is bf16 on a GPU and fp32 on a CPU."""

    @model_validator(mode="before")
    @classmethod
    def _type_tables(cls, values: Any) -> Any:
        if isinstance(values, cls):
            return values
        tables = {name: table for name, table in values.items() if name not in cls.model_fields}
        for name, table in (tables or {REFERENCE_REWARD: {}}).items():
            if isinstance(table, dict):
                table = {"kind": name, **table}
                tables[name] = reward_class(table["kind"]).Settings.model_validate(table)
        return {**values, **tables}

    def files(self) -> Iterator[tuple[str, str, Wanted]]:
        for name, table in self.active.items():
            yield from ((f"{name}.{key}", path, wanted) for key, path, wanted in table.files())

    @property
    def tables(self) -> dict[str, RewardTable]:
        """Name -> table."""
        return self.__pydantic_extra__

    @property
    def active(self) -> dict[str, RewardTable]:
        """The tables with a weight other than 0."""
        return {name: table for name, table in self.tables.items() if table.weight}
