"""The loop of the jobs that minimise a loss: pre-training, distillation, fine-tuning, tokenizer, classifier."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from torch import Tensor, nn

from grpo.checkpoint import ExtraState
from grpo.data import ImageBatch, ImageDataset, build_stream
from grpo.parallel import MetricSums, gradient_sync
from grpo.position import counted
from grpo.training.judge import RunJudge
from grpo.training.optimizer import GuardedOptimizer
from grpo.training.run import TrainingRun


class Batch(Protocol):
    """What a step is made of on this rank, an `ImageBatch` or what a job makes of one."""

    rows: int

    def parts(self, size: int) -> Sequence[Self]:
        """The batch in parts of at most `size` rows."""


def minimise(
    run: TrainingRun,
    model: nn.Module,
    dataset: ImageDataset,
    loss: Callable[[Any], tuple[Tensor, Mapping[str, Tensor]]],
    *,
    optimizer: GuardedOptimizer,
    prepare: Callable[[ImageBatch], Batch] = lambda images: images,
    judge: RunJudge | None = None,
    extra: Mapping[str, ExtraState] | None = None,
    after_step: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> None:
    """Train to the last step of the run, resuming if there is something to resume from.

    Args:
        model: parallelized, in train mode.
        loss: a micro-batch -> its mean loss [] and means of other metrics by name, each over the micro-batch's rows.
        prepare: the images of a step on this rank -> what is cut into micro-batches. Every rank calls it once a step.
        judge: evaluates the run now and then.
        extra: by name, what else the run goes on from.
        after_step: called after each optimizer step with its number; gives more metrics, which are means over ranks.
    """
    training, workers, world = run.recipe.training, run.recipe.data.num_workers, run.world
    stream = build_stream(dataset, batch_size=training.images, seed=training.seed, num_workers=workers, world=world)
    run.start(model=model, optimizer=optimizer, stream=stream, judge=judge, extra=extra)
    for step in run.steps():
        metrics = MetricSums()
        with run.timer("data"):
            images = next(stream).to(world.device)  # [B]
        prepared = prepare(images)
        parts = prepared.parts(training.micro_batch_size)
        for batch in counted(parts, "micro-batch"):
            gradient_sync(model, batch is parts[-1])
            value, means = loss(batch)
            with run.timer("backward"):
                optimizer.backward(value * (batch.rows / prepared.rows))
            for name, mean in {"loss": value, **means}.items():
                metrics.add(name, mean.detach().double() * batch.rows, batch.rows)
        for name, number in {**optimizer.step(), **after_step(step)}.items():
            metrics.add(name, number)
        run.finish(step, metrics, images=images.rows * world.size)
