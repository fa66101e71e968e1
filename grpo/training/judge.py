"""Evaluation during training: the same requests and random numbers, seen by a network that rewards nothing."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from grpo.config import GeneratorRecipe, Judge, UserError
from grpo.config.types import LARGEST_INT
from grpo.data import ImageDataset, RequestList, build_dataset
from grpo.evaluation import (
    ClassifierJudge,
    DatasetImages,
    DrawnImages,
    FeatureStatistics,
    ImageSource,
    InceptionJudge,
    classes_in_turn,
    frechet_distance,
    measure_images,
    open_images,
)
from grpo.kernels import Draw
from grpo.models import Condition, VQModel, load_classifier, to_uint8
from grpo.observe import finite, image_grid, labelled_strips, write_atomically
from grpo.parallel import World, broadcast_object
from grpo.rollout import CodeSampler

RECORDS_NAME, EVOLUTION_NAME = "judge.json", "evolution.png"
STRIP_IMAGES, STRIPS = 10, 12  # of a strip, and strips in the picture at most


class Verdict(NamedTuple):
    """What an evaluation says: what to tell the user, and why the run must stop if it must."""

    notes: list[str]
    problem: str | None = None


class RunJudge:
    """Evaluates a run now and then, and compares what it sees with the reward. Every rank takes part.

    What it draws is a function of the weights and of `judge.seed`. It is part of what a run goes on from: its records,
    the reward since the last one, and the time spent. They are in `judge.json` too, and the first images of each
    evaluation under each other in `samples/evolution.png`.

    Args:
        model: the generator, parallelized.
        decode: codes [B, T] -> images [B, 3, H, W] in [-1, 1].
        condition: what is asked for, a row an image.
        network: looks at images, see `grpo.evaluation.Judge`.
        reference: statistics of its features of the reference images.
        run_dir: the run's folder, where the main rank writes.
    """

    def __init__(
        self,
        config: Judge,
        *,
        model: nn.Module,
        decode: Callable[[Tensor], Tensor],
        condition: Condition | RequestList,
        network: ClassifierJudge | InceptionJudge,
        reference: FeatureStatistics,
        run_dir: Path,
        impl: str,
        world: World,
    ) -> None:
        self.config, self.decode, self.condition, self.network = config, decode, condition, network
        self.reference, self.run_dir, self.world = reference, run_dir, world
        draw = Draw(temperature=config.temperature, seed=config.seed, impl=impl)
        self.draw_codes = CodeSampler(model, draw=draw, cfg_scale=config.cfg_scale, keep_memory=0.0)
        self.records: list[dict[str, float]] = []  # of each evaluation: step, fid, accuracy, reward, seconds
        self._reward_sum, self._reward_steps, self._run_seconds = 0.0, 0, 0.0
        self._first = torch.empty(0)  # images of the strip

    def note(self, reward: float | None, seconds: float) -> None:
        """Take a step's mean reward, None in jobs without, and its seconds with what was judged in it.

        One that is not finite, of a step in which all completions abstained or a fault, is left out.
        """
        self._run_seconds += seconds
        if reward is not None and math.isfinite(reward):
            self._reward_sum, self._reward_steps = self._reward_sum + reward, self._reward_steps + 1

    def due(self, step: int, *, last: bool) -> bool:
        """Whether an evaluation comes after this step; the main rank's clock decides for all. Collective."""
        if not last and step % self.config.interval:
            return False
        if last or not self.records:
            return True
        spent, expected = sum(record["seconds"] for record in self.records), self.records[-1]["seconds"]
        within = spent + expected <= self.config.max_time_share * (self._run_seconds + expected)
        return bool(broadcast_object(within))

    def __call__(self, step: int) -> dict[str, float]:
        """Metrics of the model as it is: judge/fid and, by a classifier, judge/accuracy. The same on all ranks."""
        source = DrawnImages(self.condition, self._own_images())
        seen = measure_images(source, self.network, batch_size=self.config.batch_size, device=self.world.device)
        metrics: dict[str, float] = {}
        if self.world.is_main:
            metrics["fid"] = frechet_distance(seen.gaussian(self.world.device), self._on_device(self.reference))
            if seen.class_ids is not None:
                correct = seen.probabilities.argmax(dim=1) == seen.class_ids
                metrics["accuracy"] = correct.double().mean().item()
        metrics = broadcast_object(metrics)
        self.records.append({"step": step, **metrics})
        return {f"judge/{name}": value for name, value in metrics.items()}

    def record(self, seconds: float) -> Verdict:
        """Complete the newest record, write it down, and compare it with those before."""
        newest = self.records[-1]
        newest["seconds"] = float(broadcast_object(seconds))
        if self._reward_steps:
            newest["reward"] = self._reward_sum / self._reward_steps
        self._reward_sum, self._reward_steps = 0.0, 0
        if self.world.is_main:
            self._write(int(newest["step"]))
        alarm = alarm_of(self.records, self.config.patience)
        return Verdict([], alarm) if self.config.stop else Verdict([alarm] if alarm else [])

    @property
    def time_share(self) -> float:
        """Share of the run's time that was spent here, the last step included."""
        return sum(record["seconds"] for record in self.records) / max(self._run_seconds, 1e-9)

    def _own_images(self) -> Callable[[Condition, Tensor], Tensor]:
        """Draws this rank's images, as many as every other rank does, and gives the way to their pixels."""
        size, count, ranks = self.config.batch_size, self.condition.rows, self.world.size
        starts = list(range(0, count, size))
        mine = starts[self.world.rank :: ranks]
        rows = torch.tensor([row for start in mine for row in range(start, min(start + size, count))] or [0])
        most = min(count, size * len(starts[::ranks]))  # images of the rank that draws most
        rows = rows[torch.arange(most) % len(rows)]
        condition, row_ids = self.condition.select(rows), rows.to(self.world.device)
        codes = self.draw_codes(condition.to(self.world.device), row_ids=row_ids).tokens

        @torch.no_grad()
        def images(condition: Condition, row_ids: Tensor) -> Tensor:
            place = mine.index(int(row_ids[0])) * size
            pixels = to_uint8(self.decode(codes[place : place + len(row_ids)]).float().clamp(-1, 1))
            if int(row_ids[0]) == 0:
                self._first = pixels[:STRIP_IMAGES].cpu()
            return pixels

        return images

    def _on_device(self, statistics: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(*(moment.to(self.world.device) for moment in statistics))

    def _write(self, step: int) -> None:
        folder = self.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        image_grid(self._first, columns=STRIP_IMAGES).save(folder / f"judge-{step:06d}.png")
        shown = [(_label(record), folder / f"judge-{record['step']:06.0f}.png") for record in _spread(self.records)]
        labelled_strips([strip for strip in shown if strip[1].exists()]).save(folder / EVOLUTION_NAME)
        records = [{**finite(record), "step": record["step"]} for record in self.records]
        write_atomically(self.run_dir / RECORDS_NAME, json.dumps(records, indent=2) + "\n")

    def state_tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, object]:
        """Records, the reward since the last one, and the time."""
        since = {"reward_sum": self._reward_sum, "reward_steps": self._reward_steps}
        return {"records": self.records, "run_seconds": broadcast_object(self._run_seconds), **since}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises a TypeError or ValueError for anything else."""
        records = [dict(record) for record in state["records"]]
        since = [state[key] for key in ("run_seconds", "reward_sum", "reward_steps")]
        numbers = [*since, *(value for record in records for value in record.values())]
        if any(type(number) not in (int, float) for number in numbers):
            raise TypeError("the judge's state holds something else than numbers")
        if not all({"step", "fid", "seconds"} <= record.keys() for record in records):
            raise ValueError("a record of the judge lacks its step, its FID or its seconds")
        if any(abs(number) > LARGEST_INT for number in numbers if isinstance(number, int)):
            raise ValueError("the judge's state holds a number that is too large")
        self.records, (self._run_seconds, self._reward_sum, self._reward_steps) = records, since


def build_judge(
    recipe: GeneratorRecipe, model: nn.Module, tokenizer: VQModel | None, dataset: ImageDataset, world: World
) -> RunJudge | None:
    """The judge of a recipe, which has seen its reference once; None where `judge.interval` is 0. Collective.

    `tokenizer` decodes; it may be None where there is no judge.

    Raises:
        UserError: the reference's images are of another size than those that are drawn, or there is one only.
    """
    config, side = recipe.judge, recipe.data.image_size
    if not config.interval:
        return None
    if config.feature_checkpoint is not None:
        network = ClassifierJudge(load_classifier(config.feature_checkpoint).to(world.device))
    else:
        network = InceptionJudge(config.inception_checkpoint, device=world.device)
    seen = measure_images(_reference(recipe), network, batch_size=config.batch_size, device=world.device)
    if seen.size != (side, side):
        found = "x".join(map(str, seen.size))
        raise UserError(f"judge.reference: its images are {found} pixels and those that are drawn {side}x{side}")
    if seen.statistics is None and len(seen.features) < 2:
        raise UserError("judge.reference: a distance takes two reference images at least, and there is one")
    return RunJudge(
        config,
        model=model,
        decode=tokenizer.decode,
        condition=_asked(recipe, dataset),
        network=network,
        reference=seen.gaussian("cpu"),
        run_dir=recipe.run_dir,
        impl=recipe.training.kernels,
        world=world,
    )


def _asked(recipe: GeneratorRecipe, dataset: ImageDataset) -> Condition | RequestList:
    """What the judge has drawn, a row an image: the classes of the data set in turn, or captions evenly over it."""
    count = recipe.judge.num_images
    if dataset.requests is not None:
        return RequestList(dataset.requests, length=len(dataset), count=count, seed=recipe.judge.seed)
    classes = range(recipe.model.num_classes) if dataset.is_stream else np.unique(dataset.class_ids).tolist()
    return classes_in_turn(classes, count)


def alarm_of(records: Sequence[dict[str, float]], patience: int) -> str | None:
    """A line where FID has been worse than its best for `patience` evaluations (or twice, three times as many) and the
    reward, which is the mean over the steps before an evaluation, is higher than it was then. NaN is worse than any."""
    judged = [record for record in records if "reward" in record]
    fids = [record["fid"] if math.isfinite(record["fid"]) else math.inf for record in judged]
    best = fids.index(min(fids)) if fids else 0
    since = judged[best + 1 :]
    if not since or fids[best] == math.inf or len(since) % patience or since[-1]["reward"] <= judged[best]["reward"]:
        return None
    then, now = judged[best], since[-1]
    rise, fall = (f"{then[name]:.4g} -> {now[name]:.4g}" for name in ("reward", "fid"))
    return (
        f"the reward rises ({rise}) while the judge's FID has been worse than at step {then['step']} for {len(since)} "
        f"evaluations ({fall}): the reward may be deceived"
    )


class _SpreadImages(DatasetImages):
    """`limit` images of a data set, evenly over its whole length, so that all classes of a sorted one are there."""

    def image(self, index: int) -> Tensor:
        return super().image(index * len(self._dataset) // len(self))


def _reference(recipe: GeneratorRecipe) -> ImageSource:
    config, data = recipe.judge, recipe.data
    if config.reference is not None:
        return open_images(config.reference, limit=config.num_reference_images)
    if config.split is not None:
        data = data.model_copy(update={"split": config.split})
    num_classes = None if recipe.model.is_text else recipe.model.num_classes
    dataset = build_dataset(data, num_classes=num_classes)  # counted, not compared
    return _SpreadImages(dataset, limit=config.num_reference_images)


def _label(record: dict[str, float]) -> str:
    accuracy = f", accuracy {record['accuracy']:.3f}" if "accuracy" in record else ""
    return f"step {record['step']:.0f}: FID {record['fid']:.4g}{accuracy}"


def _spread(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most `STRIPS` of them: the first, the last, and others evenly between."""
    if len(records) <= STRIPS:
        return list(records)
    return [records[round(index * (len(records) - 1) / (STRIPS - 1))] for index in range(STRIPS)]
