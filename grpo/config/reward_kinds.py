"""The kinds of rewards: names that are imported only when a recipe asks for them."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from grpo.config.errors import UserError, did_you_mean

REWARD_KINDS: dict[str, str] = {
    "reconstruction": "grpo.rewards.reconstruction:Reconstruction",
    "embedding_cosine": "grpo.rewards.embedding_cosine:EmbeddingCosine",
    "class_log_prob": "grpo.rewards.class_log_prob:ClassLogProb",
    "jpeg_size": "grpo.rewards.jpeg_size:JPEGSize",
    "python": "grpo.rewards.python_function:PythonFunction",
}
"""Kind -> module and class. A new reward is one file and one line here."""


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
