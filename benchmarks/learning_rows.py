"""The rows of the learning benchmark and the cells that they are made of.

A cell is declared by what it does and by the cells that it needs; its key is a hash of both, so a finished cell is
known again, and one whose declaration has changed is done anew. How many steps fit into the time is not part of the
key: it is found on the machine at hand (the cells `seconds/...`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import tomli

from grpo.config import AVERAGE_NAME, EXPORT_NAME, SHIPPED_RECIPES

BASES, SEEDS = (3, 4, 5), (0, 1)  # of claims: seeds of tokenizer and pre-training, and of the training that follows
TUNING_BASE, TUNING_SEED = 0, 100  # settings are chosen on a base, and with a seed, of which nothing is claimed
GUIDANCE, TEMPERATURES = (1.25, 1.5, 1.75, 2.0), (0.9, 1.0)
CHOOSES, JUDGES = ("chooser", "validation"), ("judge", "test")  # a classifier and the split it compares with
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "reward": {"data.split": "train_a", "training.seed": 1},  # the quickstart's
    "second": {"data.split": "train_a", "training.seed": 14},  # features of another network that rewards
    "judge": {"data.split": "train_b", "training.seed": 12},  # looks at `test` and at nothing else
    "chooser": {"data.split": "train", "training.seed": 13},  # looks at `validation`, to choose settings
}


MAKING = {"classifier": 8.0, "tokenizer": 35.0, "pretrain": 110.0}
"""CPU time of what comes before the rows, about."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are those of the published table."""

    seconds: float = 80.0  # CPU time of each training, on one thread
    images: int = 5000  # of a number that is claimed
    choosing_images: int = 2000  # of a number by which a setting is chosen
    bases: tuple[int, ...] = BASES
    seeds: tuple[int, ...] = SEEDS
    timing: float = 5.0  # CPU time of a trial that finds how long a step takes
    making: Mapping[str, int] = field(default_factory=dict)  # steps of tokenizer, pretrain, classifier


@dataclass(frozen=True)
class Cell:
    """One piece of work. `order`: the lower, the sooner. `needs`: cells that come before it."""

    name: str
    kind: str  # train, look or seconds
    order: float
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def expected_seconds(self) -> float:
        """CPU time that it takes, about."""
        if self.kind == "look":
            guided = "grid" in self.settings or self.settings.get("point", (1.0,))[0] != 1.0
            return 3.0 + self.settings["count"] * (0.0038 if guided else 0.0022)
        return 15.0 if self.kind == "seconds" else self.settings.get("cpu_seconds") or MAKING[self.settings["job"]]

    def key(self, keys: Mapping[str, str]) -> str:
        """Of this declaration, of the recipe that it is a change of, and of those that it builds on."""
        settings = dict(self.settings)
        if "config" in settings:
            later = {key for candidate in settings.get("candidates", ()) for key in candidate}
            later |= {"training.steps"} if "timed" in settings else set()
            given = {**shipped(settings["config"]), **settings["flags"]}
            settings["flags"] = {key: value for key, value in given.items() if key not in later}
        own = json.dumps([self.kind, settings, [keys[name] for name in self.needs if name in keys]], sort_keys=True)
        return hashlib.sha256(own.encode()).hexdigest()[:16]


@cache
def shipped(config: str) -> dict[str, Any]:
    """The keys of a recipe of the quickstart, without those that change no result or are always given."""
    text = (SHIPPED_RECIPES / "quickstart" / f"{config}.toml").read_text()
    idle = ("metrics", "job", "training.micro_batch_size", "training.mixed_precision", "model.checkpoint")
    return {key: value for key, value in flattened(tomli.loads(text)) if not key.startswith(idle)}


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by their dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Row:
    """A way to train, from a base or from what another row has made of it.

    `candidates` are settings of which the best is taken: by the lowest FID that the classifier `chooser` finds against
    `validation`, on the base and the seed that are there for it.
    """

    title: str
    job: str
    config: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Mapping[str, Any], ...] = ({},)
    start: str | None = None
    share: float = 1.0  # of the time
    shown: bool = True  # whether it is a row of the table, or only where others start
    averaged: bool = False  # whether the moving average of its weights is a row too
    seeds: int = len(SEEDS)
    block: int = 0  # rows of a lower block come first
    change_of: str | None = None  # the row that a lever is a change of, and is compared with


def rates(*values: float) -> tuple[dict[str, float], ...]:
    """Candidates that differ in the learning rate."""
    return tuple({"optimizer.lr": value} for value in values)


FALLING = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 5}
K3 = {"objective.aux_ce_weight": 0.0, "objective.kl": "k3", "objective.kl_coef": 0.1}
GRPO = {**FALLING, "objective.aux_ce_weight": 0.1}
GRPO_MORE_CE = {**FALLING, "objective.aux_ce_weight": 0.2}
BATCH_64 = {**FALLING, "training.batch_size": 64}


def lever(title: str, **flags: Any) -> Row:
    """A change to "distilled, then GRPO" at the lower rate, with one training seed."""
    given = {**GRPO, "optimizer.lr": 1e-4, **{key.replace("__", "."): value for key, value in flags.items()}}
    return Row(title, "train", "grpo", given, start="start", share=0.5, seeds=1, block=3, change_of="plain")


ROWS: dict[str, Row] = {
    "ce": Row("more cross-entropy", "pretrain", "pretrain", FALLING, rates(5e-4, 2e-3, 5e-3)),
    "start": Row("distilled, half the time", "distill", "distill", BATCH_64, rates(5e-4, 1e-3), share=0.5, shown=False),
    "distill+grpo": Row(
        "distilled, then GRPO", "train", "grpo", {**GRPO, "training.ema_decay": 0.9}, rates(1e-4, 2e-4),
        start="start", share=0.5, averaged=True,
    ),
    "distill": Row("distilled", "distill", "distill", BATCH_64, rates(5e-4, 1e-3)),
    "grpo": Row("GRPO", "train", "grpo", GRPO, rates(1e-4, 2e-4)),
    "gft": Row("GFT", "finetune", "gft", FALLING, rates(2e-3, 5e-3)),
    "gft start": Row("GFT, .7 of the time", "finetune", "gft", FALLING, rates(2e-3), share=0.7, shown=False),
    "gft+grpo": Row("GFT, then GRPO", "train", "grpo", GRPO_MORE_CE, rates(2e-4), start="gft start", share=0.3),
    "cca": Row("CCA", "finetune", "cca", BATCH_64, rates(3e-6, 1e-5, 3e-5), block=1, seeds=1),
    # VA-π's pattern, on completions of real digits
    "forced": Row("teacher-forced, reward and CE", "train", "grpo_vapi", FALLING, rates(1e-4), block=2, seeds=1),
    "forced reward": Row(
        "teacher-forced, reward alone", "train", "grpo_vapi", {**FALLING, "objective.aux_ce_weight": 0.0},
        rates(1e-4), block=2, seeds=1,
    ),
    "forced ce": Row(
        "teacher-forced, CE alone", "pretrain", "pretrain",
        {**FALLING, "model.class_dropout": 0.0, "optimizer.weight_decay": 0.0}, rates(1e-4), block=2, seeds=1,
    ),
    "plain": lever("distilled, then GRPO, one seed, beside the levers"),
    "k3": lever("the same, KL to the start, no CE", **K3),
    "ce weight": lever("the same, CE weight .3", objective__aux_ce_weight=0.3),
    "no ce": lever("the same, CE weight 0", objective__aux_ce_weight=0.0),
    "loo fid": lever(
        "the same, leave-one-out FID in two networks beside", objective__advantage="gdpo",
        reward__fid_a__kind="loo_fid", reward__fid_a__net="classifier", reward__fid_a__checkpoint="@reward",
        reward__fid_b__kind="loo_fid", reward__fid_b__net="classifier", reward__fid_b__checkpoint="@second",
        reward__fid_a__memory=0.95, reward__fid_b__memory=0.95,
        reward__fid_a__weight=0.5, reward__fid_b__weight=0.5,
    ),
    "log ratio": lever(
        "the same, log-ratio as reward, KL, no CE", reward__class_log_prob__weight=0.0, reward__log_ratio__weight=0.5,
        objective__aux_ce_weight=0.0, objective__kl="k3", objective__kl_coef=1.0,
    ),
    "ema kl": lever(
        "the same, KL to its average, no CE", objective__aux_ce_weight=0.0, objective__kl="k3", objective__kl_coef=0.1,
        objective__reference="ema", training__ema_decay=0.95,
    ),
    "guided rollouts": replace(
        lever("GRPO, guided rollouts, loss of the unguided policy", rollout__cfg_scale=1.5,
              rollout__guidance_in_loss="conditional"),
        start=None, share=1.0,
    ),
    "long": replace(lever("the same, four times as long"), share=2.0),
}  # fmt: skip
"""The ways to train, by name."""


def declare(sizes: Sizes) -> dict[str, Cell]:
    """All cells by name."""
    cells = [*_networks(sizes), *_base_rows(sizes)]
    for place, (name, row) in enumerate(ROWS.items()):
        cells += _row(name, row, order=100 * row.block + place, sizes=sizes)
    return {cell.name: cell for cell in cells}


def look_cell(
    name: str, model: str, base: int, *, order: float, sizes: Sizes, judge: tuple[str, str], **how: Any
) -> Cell:
    """A look at a model's images: by the judge of claims at as many as those take, else at fewer, with another seed.

    `how`: `point` (guidance, temperature), (1, 1) if not given; `grid`, cells of which the best one's point is taken;
    `file` of the weights.
    """
    claims = judge == JUDGES
    settings = {
        "weights": f"{model}/{how.pop('file', EXPORT_NAME)}", "tokenizer": f"tokenizer-{base}/{EXPORT_NAME}",
        "count": sizes.images if claims else sizes.choosing_images, "seed": int(claims), "judge": judge, **how,
    }  # fmt: skip
    return Cell(name, "look", order, settings, (model, *judge[:1], "reward", *how.get("grid", ())))


def picture_of(folder: Path, look: str) -> Path:
    """The file with the first images of a look, below the folder of the benchmark."""
    return folder / "grids" / f"{look.replace('/', '-')}.png"


def _networks(sizes: Sizes) -> Iterator[Cell]:
    """Classifiers, tokenizers, bases."""
    made = sizes.making

    def steps(job: str) -> dict[str, int]:
        return {"training.steps": made[job]} if job in made else {}

    for name, flags in CLASSIFIERS.items():
        config = "classifier_reward" if name in ("reward", "second") else "classifier_judge"
        given = {**flags, **steps("classifier")}
        yield Cell(name, "train", 0, {"job": "classifier", "config": config, "flags": given})
    for base in (*sizes.bases, TUNING_BASE):
        seed, tokenizer = {"training.seed": base}, f"tokenizer-{base}"
        given = {**seed, **steps("tokenizer")}
        yield Cell(tokenizer, "train", 0, {"job": "tokenizer", "config": "tokenizer", "flags": given})
        given = {**seed, "tokenizer.checkpoint": f"@{tokenizer}", **steps("pretrain")}
        settings = {"job": "pretrain", "config": "pretrain", "flags": given}
        yield Cell(f"base-{base}", "train", 1, settings, (tokenizer,))


def _guided(model: str, base: int, name: str, *, order: float, sizes: Sizes) -> Iterator[Cell]:
    """The grid of a model and the best of it; of a base also FID under each guidance at the temperature of the best."""
    for cell, point in grid_of(name).items():
        yield look_cell(cell, model, base, order=order, sizes=sizes, judge=CHOOSES, point=point)
    best = {"judge": JUDGES, "grid": tuple(grid_of(name)), "order": order + 1, "sizes": sizes}
    yield look_cell(f"guided/{name}", model, base, **best)
    for scale in GUIDANCE if model.startswith("base") else ():
        yield look_cell(f"frontier/{name}/{scale}", model, base, scale=scale, **best)


def grid_of(name: str) -> dict[str, tuple[float, float]]:
    """The looks of a model's grid, and guidance and temperature of each."""
    points = product((1.0, *GUIDANCE), TEMPERATURES)
    return {f"grid/{name}/{scale}x{temperature}": (scale, temperature) for scale, temperature in points}


def _base_rows(sizes: Sizes) -> Iterator[Cell]:
    for base in sizes.bases:
        model, how = f"base-{base}", {"order": 30, "sizes": sizes}
        yield look_cell(f"look/base/{base}", model, base, judge=JUDGES, **how)
        yield from _guided(model, base, f"base/{base}", **how)


def _row(name: str, row: Row, *, order: float, sizes: Sizes) -> Iterator[Cell]:
    """Settings are tuned, then what is claimed is trained and looked at."""
    base, seed, looks, rewards = TUNING_BASE, TUNING_SEED, _tuning(name, row), ("reward", "second")
    once = {**_settings(row, base, seed, row.candidates[0]), "start": f"base-{base}"}
    once["timing"] = sizes.timing
    yield Cell(f"seconds/{name}", "seconds", order, once, (f"base-{base}", *rewards))
    timed = {"timed": f"seconds/{name}", "cpu_seconds": row.share * sizes.seconds}
    for place, look in enumerate(looks):
        run, start = f"{name}:{place}", _tuning(row.start, ROWS[row.start]) if row.start else f"base-{base}"
        settings = {**_settings(row, base, seed, row.candidates[place]), **timed, "start": start}
        needs = (*((start,) if isinstance(start, str) else start), timed["timed"], *rewards)
        yield Cell(run, "train", order + 20, settings, needs)
        yield look_cell(look, run, base, order=order + 20, sizes=sizes, judge=CHOOSES)
    for base, seed in product(sizes.bases, sizes.seeds[: row.seeds]):
        run, start = f"{name}/{base}.{seed}", f"{row.start}/{base}.{seed}" if row.start else f"base-{base}"
        settings = {**_settings(row, base, seed, {}), **timed, "start": start, "tuned": looks}
        settings["candidates"] = row.candidates
        needs = (start, timed["timed"], *rewards, *looks)
        yield Cell(run, "train", order + 40, settings, needs)
        if row.shown:
            yield look_cell(f"look/{run}", run, base, order=order + 60, sizes=sizes, judge=JUDGES)
        if row.averaged:
            how = {"order": order + 60, "sizes": sizes, "judge": JUDGES, "file": AVERAGE_NAME}
            yield look_cell(f"look/{name} average/{base}.{seed}", run, base, **how)
        if name == "ce":
            yield from _guided(run, base, f"ce/{base}.{seed}", order=order + 50, sizes=sizes)


def _tuning(name: str, row: Row) -> tuple[str, ...]:
    """The looks by which the row's setting is chosen; none where there is no choice."""
    several = len(row.candidates) > 1
    return tuple(f"look/{name}:{candidate}" for candidate in range(len(row.candidates))) if several else ()


def _settings(row: Row, base: int, seed: int, candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Of every training of a row; @NAME stands for the weights of a cell."""
    flags = {"training.seed": seed, "tokenizer.checkpoint": f"@tokenizer-{base}", **row.flags, **candidate}
    if row.config == "grpo":
        flags["reward.class_log_prob.checkpoint"] = "@reward"
    return {"job": row.job, "config": row.config, "flags": flags}
