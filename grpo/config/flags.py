"""The command line: one flag for every key of a recipe, and the reference trainer's own flags."""

import argparse
import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from grpo.config.keys import recipe_keys
from grpo.config.recipes import GRPORecipe, Recipe

REFERENCE_FLAGS: Mapping[str, str] = {
    "--gpt-model": "model.name",
    "--gpt-ckpt": "model.checkpoint",
    "--from-fsdp": "model.from_fsdp",
    "--vq-model": "tokenizer.name",
    "--vq-ckpt": "tokenizer.checkpoint",
    "--codebook-size": "tokenizer.codebook_size",
    "--codebook-embed-dim": "tokenizer.codebook_embed_dim",
    "--image-size": "data.image_size",
    "--downsample-size": "tokenizer.downsample_size",
    "--num-classes": "model.num_classes",
    "--cls-token-num": "model.cls_token_num",
    "--mixed-precision": "training.mixed_precision",
    "--grad-precision": "training.grad_precision",
    "--data-parallel": "parallel.data_parallel",
    "--lr": "optimizer.lr",
    "--weight-decay": "optimizer.weight_decay",
    "--beta1": "optimizer.beta1",
    "--beta2": "optimizer.beta2",
    "--max-grad-norm": "optimizer.max_grad_norm",
    "--epochs": "training.steps",
    "--global-seed": "training.seed",
    "--num-generations": "rollout.num_generations",
    "--top-k": "rollout.top_k",
    "--top-p": "rollout.top_p",
    "--temperature": "rollout.temperature",
    "--sample-batch-size": "rollout.batch_size",
    "--train-batch-size": "training.batch_size",
    "--gradient-accumulation-steps": "training.gradient_accumulation_steps",
    "--num-workers": "data.num_workers",
    "--adv-clip-max": "objective.advantage_clip",
    "--clip-range": "objective.clip_range",
    "--dataset": "data.name",
    "--data-path": "data.path",
    "--use-wandb": "metrics.wandb",
    "--wandb-project": "metrics.wandb_project",
    "--wandb-entity": "metrics.wandb_entity",
    "--wandb-run-name": "metrics.wandb_run_name",
    "--log-image-every": "metrics.image_interval",
    "--log-interval": "metrics.interval",
    "--ckpt-every": "checkpoint.interval",
    "--ckpt-dir": "checkpoint.dir",
    "--ckpt-sharded": "checkpoint.sharded",
    "--uncond-prob": "model.class_dropout",
    "--sample-model-mode": "training.dropout_mode",
    "--reward-rec-type": "reward.reconstruction",
    "--reward-rec-weight": "reward.reconstruction_weight",
    "--reward-perceptual-weight": "reward.lpips_weight",
    "--reward-use-gan": "reward.discriminator",
    "--reward-gan-weight": "reward.discriminator_weight",
    "--reward-disc-dim": "reward.discriminator_dim",
    "--reward-disc-num-layers": "reward.discriminator_layers",
    "--reward-disc-ckpt": "reward.discriminator_checkpoint",
    "--reward-use-embedcos": "reward.embedding_cosine",
    "--reward-embedcos-weight": "reward.embedding_cosine_weight",
    "--aux-ce-weight": "objective.aux_ce_weight",
    "--kl-coef": "objective.kl_coef",
    "--use-kl-loss": "objective.use_kl_loss",
    "--kl-base-ckpt": "objective.reference_checkpoint",
    "--use-token-noise": "rollout.use_context_noise",
    "--token-noise-prob": "rollout.context_noise",
    "--use-token-dropout": "objective.use_token_dropout",
    "--token-dropout-ratio": "objective.token_dropout",
}
"""Flag of the reference trainer -> the key that it sets."""

CONFIG = "config"


@dataclass(frozen=True)
class FlagValue:
    """One flag as typed: the key it sets, the flag, and its text (None where the user gave no value)."""

    key: str
    flag: str
    text: str | None


@dataclass(frozen=True)
class Flags:
    """A command line taken apart.

    Args:
        help: help is asked for.
        config: the recipe file.
        values: at most one for each key.
        problems: one line for each flag that is unknown, lacks its value or was given twice.
        suspects: keys that those flags meant, as far as one can tell.
    """

    help: bool
    config: str | None
    values: list[FlagValue]
    problems: list[str]
    suspects: set[str]


def reference_flags(recipe_class: type[Recipe]) -> dict[str, str]:
    """Key -> the reference trainer's flag for it; only GRPO has them, elsewhere the names would mislead."""
    return {key: flag for flag, key in REFERENCE_FLAGS.items()} if issubclass(recipe_class, GRPORecipe) else {}


def parse_flags(recipe_class: type[Recipe], argv: Sequence[str]) -> Flags:
    """Read a command line.

    Args:
        recipe_class: the job.
        argv: arguments without the program's name.

    Returns:
        The values as text, still to be checked, and what is wrong with the flags themselves.
    """
    keys, reference = recipe_keys(recipe_class), reference_flags(recipe_class)
    options = {key: [f"--{key}", reference[key]] if key in reference else [f"--{key}"] for key in (CONFIG, *keys)}
    parser = _build_parser(options, [key.name for key in keys.values() if key.is_switch])
    parsed, extras = parser.parse_known_args(_join_negative_numbers(argv))
    problems, suspects = _unknown_flags(extras, {name: key for key, names in options.items() for name in names})
    values: dict[str, FlagValue] = {}
    for given in parsed.given:
        if given.key in values:
            problems.append(f"{given.flag}: {given.key} is already set by {values[given.key].flag}; give one of them")
        elif given.text is None:
            problems.append(f"{given.flag}: a value is missing (write {given.flag}=VALUE if it begins with a minus)")
            suspects.add(given.key)
        values.setdefault(given.key, given)
    if CONFIG in suspects:  # a file that was meant may have set any key
        suspects.update(keys)
    config = values.pop(CONFIG, None)
    return Flags(
        help=parsed.help,
        config=config and config.text,
        values=[value for value in values.values() if value.text is not None],
        problems=problems,
        suspects=suspects,
    )


class _Collect(argparse.Action):
    """Append every value to one list, so that nothing is overwritten unseen."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | None,
        option_string: str | None = None,
    ) -> None:
        namespace.given.append(FlagValue(self.dest, option_string, values))


def _build_parser(options: Mapping[str, Sequence[str]], switches: Collection[str]) -> argparse.ArgumentParser:
    """A parser that takes text only: what a value means and whether it is right is pydantic's part."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.set_defaults(given=[], help=False)
    parser.add_argument("-h", "--help", action="store_true")
    for key, names in options.items():  # no value is an error for all but switches, reported with the others
        parser.add_argument(*names, action=_Collect, dest=key, nargs="?", const="true" if key in switches else None)
    return parser


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--flag -1e-3` as `--flag=-1e-3`: argparse would take all but plain decimals for another flag."""
    joined: list[str] = []
    for argument in argv:
        if argument.startswith("-") and _is_number(argument) and joined and _is_bare_flag(joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_bare_flag(text: str) -> bool:
    return text.startswith("--") and "=" not in text


def _unknown_flags(extras: Sequence[str], known: Mapping[str, str]) -> tuple[list[str], set[str]]:
    """A line for each argument that is no flag, and the keys of the flags that were probably meant.

    The word after an unknown flag is taken for its value.
    """
    problems, suspects = [], set()
    for before, argument in itertools.pairwise(["", *extras]):
        if argument.startswith("-"):
            flag = argument.partition("=")[0]
            nearest = difflib.get_close_matches(flag, known, n=1)
            suspects.update(known[match] for match in nearest)
            problems.append(f"{flag}: unknown flag" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        elif not before.startswith("-") or "=" in before:
            problems.append(f"{argument}: unexpected argument; settings are given as --section.key VALUE")
    return problems, suspects
