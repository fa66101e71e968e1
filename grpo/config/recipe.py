"""What all recipes share: their base class, the checks of several jobs, and how two of them differ.

A recipe object is always valid: every key by its section, every combination by the checks of its job. A check gives a
line for all that it finds, so that a user mends a recipe once. The line names every key that takes part as
`section.key`; the loader tells by them where the mistake was made.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import tomli_w
from pydantic import BaseModel, ConfigDict, model_validator

from grpo.config.sections import Checkpoint, Data, Debug, Metrics, Optimizer, Parallel, Training
from grpo.config.types import Section, Wanted, Written, is_url, same_file

ORDER = (
    "convert", "model", "lora", "text", "tokenizer", "tokenizer_loss", "adversary", "classifier", "reader", "sampling",
    "output", "share", "demo", "data", "encode", "encode_text", "evaluation", "rollout", "reward", "objective",
    "distill", "finetune", "optimizer", "training", "parallel", "compile", "activation_checkpoint", "checkpoint",
    "metrics", "judge", "debug",
)  # fmt: skip
"""Sections in the order in which a reader wants them, whichever class declares them."""


DATA_IN_FILES = ("imagenet", "huggingface", "folder", "captions", "webdataset", "parquet", "stream", "codes", "prompts")


EXPORT_NAME = "model.safetensors"
AVERAGE_NAME = "model_ema.safetensors"  # the moving average of the weights, where there is one
ADAPTER_NAMES = {EXPORT_NAME: "adapter", AVERAGE_NAME: "adapter_ema"}  # folders of the adapter beside merged weights
RUN_FILES = (EXPORT_NAME, AVERAGE_NAME)
"""What a run leaves in its folder for the next job."""


class Recipe(BaseModel):
    """Base of all recipes; every field is a section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: ClassVar[str]
    """Word of the job on the command line, and the value of the key `job` in its file."""

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Name and class of every section, in the order of the file."""
        names = sorted(cls.model_fields, key=ORDER.index)
        return {name: cast(type[Section], cls.model_fields[name].annotation) for name in names}

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("; ".join(problems))
        return self

    def problems(self) -> Iterator[str]:
        """A line for every impossible combination of keys; none for a valid recipe."""
        yield from ()

    def missing_files(self) -> Iterator[str]:
        """A line for each file or folder that the job needs and that is not there, beginning with `section.key`."""
        for name in self.sections():
            yield from (f"{name}.{line}" for line in getattr(self, name).missing_files())

    def overwritten_inputs(self, others: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
        """A line for each file or folder that the job would both read and write, beginning with the key that writes.

        `others` are read too, by the names of their flags.
        """
        named = list(self._named_paths())
        inputs = [*others.items(), *((key, path) for key, path, kind in named if isinstance(kind, Wanted))]
        outputs: list[tuple[str, str | Path, bool]]
        outputs = [(key, path, kind.folder) for key, path, kind in named if isinstance(kind, Written)]
        outputs += [(key, path, False) for key, path in self.written_files()]
        for key, path, is_folder in outputs:
            for read_key, read_path in inputs:
                if same_file(path, read_path) and os.path.isdir(path) == is_folder:
                    yield f"{key}: {path} would be written over what {read_key} names; give another path"

    def written_files(self) -> Iterator[tuple[str, Path]]:
        """Keys and paths of what the job writes under names of its own, where there may be something of the user's."""
        yield from ()

    def _named_paths(self) -> Iterator[tuple[str, str, Wanted | Written]]:
        """Full names of the keys that name what is read or written, with their paths."""
        sections = {name: getattr(self, name) for name in self.sections()}
        tables = getattr(sections.get("reward"), "active", {})
        for title, section in (sections | {f"reward.{name}": table for name, table in tables.items()}).items():
            for key, field in type(section).model_fields.items():
                kinds = [item for item in field.metadata if isinstance(item, Wanted | Written)]
                yield from ((f"{title}.{key}", path, kind) for kind in kinds if (path := getattr(section, key)))

    def notes(self) -> list[str]:
        """One line for each setting that has no effect next to the others."""
        changed = _changed_keys(type(self).model_construct(), self)
        idle = [(key, reason) for is_idle, keys, reason in self._idle_keys() if is_idle for key in keys.split()]
        return [f"{key} has no effect: {reason}" for key, reason in idle if key in changed]

    def remarks(self) -> list[str]:
        """What a run says of settings that mean something else here than a reader may think."""
        return []

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        """Whether it is so, the keys that then have no effect, and why."""
        return []

    def explicit(self) -> Self:
        """The same recipe with what it leaves to be computed from its other keys written out."""
        return self

    def to_toml(self) -> str:
        """The resolved recipe, to be loaded again as it is: every key but those that are none, which TOML lacks."""
        return tomli_w.dumps({"job": self.job, **self._values(exclude_none=True)})

    def _values(self, **options: Any) -> dict[str, Any]:
        """The recipe as a file has it."""
        values = self.model_dump(**options)
        return {name: values[name] for name in self.sections()}


class TrainingRecipe(Recipe):
    """Base of the recipes of runs, which have a folder and checkpoints."""

    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    debug: Debug = Debug()

    memory_is_known: ClassVar[bool] = False  # whether there is an estimate of what a step of the job takes

    def problems(self) -> Iterator[str]:
        yield from data_problems(self.data)
        if not (self.training.micro_batch_size or self.memory_is_known):
            yield f"training.micro_batch_size must be at least 1: `grpo {self.job}` has no estimate to choose it by"
        if not self.data.has_images:
            yield from (f'data.name = "{self.data.name}" has no images: {use}' for use in self.image_uses())
        if self.parallel.data_parallel == "sdp" and self.parallel.reshard_after_forward == "always":
            yield 'parallel.reshard_after_forward = "always" needs parallel.data_parallel = "fsdp", not "sdp"'
        if self.checkpoint.dir.startswith("memory://"):
            yield f"checkpoint.dir = {self.checkpoint.dir} is gone when the process ends: give a folder or a store"

    def image_uses(self) -> Iterator[str]:
        """A line for everything in the recipe that takes the data set's images."""
        yield f"`grpo {self.job}` trains on them"

    def notes(self) -> list[str]:
        notes = super().notes()
        if not self.checkpoint.save_final and not self.checkpoint.interval:
            notes.append("checkpoint.interval = 0 and checkpoint.save_final = false: nothing of this run is saved")
        return notes

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        names = ("project", "entity", "run_name", "group", "tags")
        wandb = " ".join(f"metrics.wandb_{name}" for name in names)
        best = "checkpoint.best_metric checkpoint.best_is"
        files = "data.path data.split data.class_map data.num_workers data.cache_codes data.codes data.index_cache"
        only_classes, only_texts = self.data.name == "classes", self.data.name == "prompts"
        of_images = "data.split data.class_map data.cache_codes data.codes data.index_cache"
        return [
            (only_classes, f"{files} data.max_bad_images", 'data.name = "classes" has no images'),
            (only_texts, f"{of_images} data.max_bad_images", 'data.name = "prompts" has no images'),
            (self.data.name == "codes", "data.split data.codes", 'data.name = "codes": data.path holds the codes'),
            (self.data.has_codes, "data.cache_codes", "the codes are on disk"),
            (not self.data.may_be_stream, "data.shuffle_window", "only rows of a stream are shuffled in windows"),
            (not only_classes, "data.classes", 'data.name is not "classes"'),
            (self.optimizer.schedule == "one_cycle", "optimizer.warmup_steps", "one_cycle has its own warm-up"),
            (not self.checkpoint.keep_last, "checkpoint.keep_best", "checkpoint.keep_last = 0 keeps all"),
            (not self.checkpoint.keep_best, best, "checkpoint.keep_best is 0"),
            (not self.metrics.wandb, wandb, "metrics.wandb is off"),
            (self.job != "train", "training.dropout_mode training.epochs_per_rollout", "only `train` has rollouts"),
        ]

    def files_of_every_start(self) -> dict[str, str]:
        """`section.key` -> the file or folder there, of those that the run reads again whenever it is started.

        Not those that it only began with, and has changed since; nor the images and their codes, of which the data set
        knows more.
        """
        files = {f"{name}.{key}": path for name in self.sections() for key, path, _ in getattr(self, name).files()}
        others = {"data.path", "data.codes", *self._beginnings()}
        others |= {key for key in files if key.startswith("text.")}  # as large, and told by `ImageDataset.requests`
        return {key: path for key, path in files.items() if key not in others}

    def _beginnings(self) -> set[str]:
        """Keys of weights that the run trains further, which a checkpoint replaces."""
        return set()

    def written_files(self) -> Iterator[tuple[str, Path]]:
        yield from (("metrics.run_dir", self.run_dir / name) for name in RUN_FILES)

    @property
    def run_dir(self) -> Path:
        """The run's folder: `metrics.run_dir`, which `load_recipe` sets to runs/<name of the recipe file>."""
        return Path(self.metrics.run_dir or f"runs/{self.job}")

    @property
    def checkpoint_dir(self) -> str:
        """Folder of the checkpoints, a path or a URL: inside the run's folder unless `checkpoint.dir` was moved."""
        place = self.checkpoint.dir.rstrip("/")
        if is_url(place):
            return place
        return str(Path(place or "/") if place != Checkpoint().dir else self.run_dir / place)


def required(name: str, section: Section, *keys: str) -> Iterator[str]:
    """Optional keys that a job cannot do without."""
    yield from (f"{name}.{key} is required" for key in keys if getattr(section, key) is None)


SMALLEST_SHAPES = 24  # pixels


def data_problems(data: Data) -> Iterator[str]:
    """A data set in files needs a path; the rows of a stream have no numbers by which codes could be kept."""
    if data.may_be_stream:
        where = f"data.name = {data.name}" if data.name == "stream" else f"data.path = {data.path}, which is a stream"
        keys = [key for key, is_on in (("data.codes", data.codes), ("data.cache_codes", data.cache_codes)) if is_on]
        yield from (f"{key} needs a data set whose images can be read in any order, not {where}" for key in keys)
    if data.path is None and data.name in DATA_IN_FILES:
        yield f'data.path is required with data.name = "{data.name}"'
    if data.name == "shapes" and data.image_size < SMALLEST_SHAPES:
        yield f'data.image_size must be at least {SMALLEST_SHAPES} with data.name = "shapes": smaller ones look alike'


def differences(before: Recipe, after: Recipe) -> list[str]:
    """One line for each key whose value is not the same, for two recipes of the same job."""
    return list(_changed_keys(before, after).values())


def changes_that_matter(before: Recipe, after: Recipe) -> list[str]:
    """Those of `differences` that a resumed run may not have: all but the keys that only move work around."""
    free = {f"{name}.{key}" for name, section in after.sections().items() for key in section.free_keys()}
    return [line for key, line in _changed_keys(before.explicit(), after.explicit()).items() if key not in free]


def _changed_keys(before: Recipe, after: Recipe) -> dict[str, str]:
    old, new = _flatten(before._values()), _flatten(after._values())
    keys = [key for key in {**old, **new} if repr(old.get(key)) != repr(new.get(key))]  # NaN equals itself
    return {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Value of every `section.key` and `reward.NAME.key`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
