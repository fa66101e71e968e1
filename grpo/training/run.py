"""What every training job has: a folder, an observer, checkpoints and a step counter."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import nn

from grpo.checkpoint import CheckpointManager
from grpo.config import TrainingRecipe, UserError
from grpo.data import ImageStream
from grpo.estimate import Work, device_peaks, throughput
from grpo.models import save_weights
from grpo.observe import PhaseTimer, RunObserver
from grpo.parallel import (
    MetricSums,
    World,
    all_reduce_max,
    broadcast_object,
    build_mesh,
    full_state_dict,
    set_matmul_precision,
)
from grpo.training.optimizer import GuardedOptimizer
from grpo.training.resume import find_checkpoint, read_run_state
from grpo.training.run_lock import RunLock
from grpo.training.stop_request import StopRequest

EXPORT_NAME = "model.safetensors"

_GO_ON, _STOP, _SAVE_FAILED = range(3)  # what a rank votes for after a step; the highest vote wins


class Terminated(SystemExit):
    """The run was asked to stop and has done so, with a checkpoint. The exit code is that of SIGTERM, 128 + 15."""

    def __init__(self) -> None:
        super().__init__(143)


class TrainingRun:
    """The life of one training job on this rank.

        with TrainingRun(recipe, world, title="GRPO") as run:
            run.start(model=model, optimizer=optimizer, stream=stream)
            for step in run.steps():
                ...
                run.finish(step, metrics, images=...)

    Attributes:
        mesh: the ranks, as the recipe arranges them.
        timer: phases of a step, see `PhaseTimer`.
        observer: where images and messages go.
    """

    def __init__(self, recipe: TrainingRecipe, world: World, *, title: str) -> None:
        self.recipe, self.world, self.title = recipe, world, title
        self.total_steps = recipe.training.steps
        set_matmul_precision(recipe.training.mixed_precision)
        self.mesh = build_mesh(recipe.parallel, world)
        self.timer = PhaseTimer(world.device)
        self.checkpoints = CheckpointManager(
            recipe.checkpoint_dir,
            world=world,
            config=recipe.checkpoint,
            timeout_seconds=recipe.parallel.timeout,
        )
        self._stop_request = StopRequest()
        self._lock: RunLock | None = None
        self._best_values: list[float] = []
        self._resumed_from: str | None = None
        self._skipped_before = 0
        if recipe.debug.deterministic:
            torch.use_deterministic_algorithms(True)
        self._first_step = 0

    def start(self, *, model: nn.Module, optimizer: GuardedOptimizer, stream: ImageStream) -> None:
        """Resume if there is something to resume from, and open the observer.

        Args:
            model: parallelized; its weights, the optimizer and the stream are overwritten by the checkpoint's.
            optimizer: of the model, with its counters.
            stream: the images; goes on after the last one that the checkpoint has consumed.

        Raises:
            UserError: the checkpoint belongs to another run or to a recipe that differs in a way that matters.
        """
        self._model, self._optimizer, self._stream = model, optimizer, stream
        self._stop_request.listen()
        self._take_folder()
        self._seed(0)
        notes = self.recipe.notes()
        path, named = find_checkpoint(self.recipe, self.checkpoints, notes.append)
        if path is not None:
            notes += self._resume(path, named=named)
        self.observer = RunObserver(
            self.recipe.run_dir,
            self.recipe.metrics,
            total_steps=self.total_steps,
            recipe_text=self.recipe.to_toml(),
            title=self.title,
            main=self.world.is_main,
            start_step=self._first_step,
        )
        for note in notes:
            self.observer.message(note)

    def steps(self) -> Iterator[int]:
        """The steps still to be done, counted from 1."""
        if self._first_step >= self.total_steps:
            self.observer.message(
                f"nothing to do: {self.recipe.run_dir} is at step {self._first_step} of {self.total_steps}; raise "
                "training.steps to go on, or give another metrics.run_dir to start anew"
            )
        device_peaks(self.world.device)  # it may take a moment
        self.timer.read()  # do not count the set-up
        for step in range(self._first_step + 1, self.total_steps + 1):
            with self._traced(step):
                yield step

    def finish(
        self,
        step: int,
        sums: MetricSums,
        *,
        images: int,
        codes: int = 0,
        work: Work = Work(),  # noqa: B008 - immutable
    ) -> None:
        """Write a step down, and a checkpoint when it is due.

        Args:
            sums: the metrics of this rank; they are added up over ranks here.
            images: images that all ranks together trained on in this step, for the rate.
            codes, work: of one image, and of this rank's step by phase, where the job has them; see `throughput`.

        Raises:
            UserError: too many optimizer steps in a row were skipped; there is a checkpoint of this step.
        """
        metrics, times = sums.means(), self.timer.read()
        rates = throughput(times, images=images, codes=codes, work=work, device=self.world.device)
        self.observer.log(step, {**metrics, **rates, **times})
        self._note_skipped(step, metrics)
        self._note_best(metrics)
        config, last = self.recipe.checkpoint, step == self.total_steps
        vote = all_reduce_max(self._vote())
        if vote == _SAVE_FAILED:
            self.checkpoints.wait()  # raises
        if last and config.save_final and not config.sharded:
            self._export()
        stopping = self._optimizer.stuck or (vote == _STOP and not last)
        if stopping or (last and config.save_final) or (config.interval > 0 and step % config.interval == 0):
            with self.timer("checkpoint"):
                self.save(step)
        if stopping:
            self.checkpoints.wait()
            self._stop(step)

    def _vote(self) -> int:
        if self.checkpoints.failed():
            return _SAVE_FAILED
        return _GO_ON if self._stop_request.reason is None else _STOP

    def _stop(self, step: int) -> NoReturn:
        """End the run after its checkpoint of this step."""
        if self._optimizer.stuck:
            raise UserError(
                f"stopped at step {step}: {self._optimizer.skipped_in_a_row} optimizer steps in a row had a non-finite "
                f"reward, loss or gradient and were skipped; the weights before them are in "
                f"{self.recipe.checkpoint_dir}. Lower optimizer.lr, look at the rewards in metrics.jsonl, or raise "
                "training.max_skipped_steps"
            )
        reason = self._stop_request.reason or "another rank was asked to"
        self.observer.message(
            f"stopped at step {step} ({reason}): its checkpoint is in {self.recipe.checkpoint_dir}, and the same "
            "command goes on from there"
        )
        raise Terminated

    def save(self, step: int) -> None:
        """Write a checkpoint, in the background if the recipe says so."""
        self.checkpoints.save(
            step,
            model=self._model,
            optimizer=self._optimizer.adamw,
            run_state={
                "step": step,
                "stream": self._stream.state_dict(),
                "optimizer_step": self._optimizer.state_dict(),
                "recipe": self.recipe.to_toml(),
                "run_dir": str(self.recipe.run_dir),
                "resumed_from": self._resumed_from,
            },
            rank_state=_rng_state(self.world.device),
            score=sum(self._best_values) / len(self._best_values) if self._best_values else None,
        )
        self._best_values = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.checkpoints.close()
        if hasattr(self, "observer"):
            self.observer.__exit__(kind, error, traceback)
        self._stop_request.close()
        if self._lock is not None:
            self._lock.close()

    def _take_folder(self) -> None:
        """Make sure that this run can write, and that it is the only one that does."""
        if self.world.is_main:
            self._lock = RunLock(self.recipe.run_dir, wait_seconds=self.recipe.parallel.timeout / 2)
        broadcast_object(None)  # nobody looks for a checkpoint before the folder is ours
        if self.recipe.checkpoint.interval or self.recipe.checkpoint.save_final:
            self.checkpoints.check_writable()

    def _note_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say that an optimizer step was skipped and what was not finite."""
        if self._optimizer.skipped == self._skipped_before:
            return
        self._skipped_before = self._optimizer.skipped
        names = ("reward_mean", "loss", "grad_norm")
        culprits = [name for name in names if not math.isfinite(metrics.get(name, 0.0))]
        self.observer.message(
            f"step {step}: {culprits[0] if culprits else 'a gradient'} is not finite, the optimizer step was skipped "
            f"({self._optimizer.skipped} so far, {self._optimizer.skipped_in_a_row} in a row)"
        )

    def _note_best(self, metrics: Mapping[str, float]) -> None:
        config = self.recipe.checkpoint
        if not config.keep_best:
            return
        if config.best_metric not in metrics:
            raise UserError(
                f"checkpoint.best_metric: this job has no metric {config.best_metric!r}; it has "
                f"{', '.join(sorted(metrics))}"
            )
        if math.isfinite(value := metrics[config.best_metric]):
            self._best_values.append(value)

    @contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        """Record the step if it is the one that the recipe wants a trace of."""
        if step != self.recipe.debug.profile:
            yield
            return
        with torch.profiler.profile() as profiler:
            yield
        path = self.recipe.run_dir / f"trace-step-{step:06d}-rank-{self.world.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)  # the main rank has made it on its own host only
        profiler.export_chrome_trace(str(path))
        self.observer.message(f"trace of step {step}: {path}")

    def _export(self) -> None:
        """Write the final weights under a name that does not change with the number of steps, for the next job."""
        weights = full_state_dict(self._model)
        if self.world.is_main:
            save_weights(self.recipe.run_dir / EXPORT_NAME, weights, config=self._model.config)

    def _resume(self, path: Path, *, named: bool) -> list[str]:
        """Take over a checkpoint; what to tell the user about it."""
        state, changes = read_run_state(self.recipe, self.checkpoints, path, named=named)
        rank_state = self.checkpoints.load(path, model=self._model, optimizer=self._optimizer.adamw)
        self._optimizer.load_state_dict(state["optimizer_step"])
        self._stream.load_state_dict(state["stream"])
        self._first_step = state["step"]
        self._skipped_before = self._optimizer.skipped
        self._resumed_from = str(path) if named else state.get("resumed_from")
        notes = [f"resumed from {path}", *(f"changed since then: {line}" for line in changes)]
        if rank_state is not None:
            _set_rng_state(rank_state, self.world.device)
        else:
            self._seed(self._first_step)
            notes.append("the number of ranks has changed: dropout, if any, goes on with new random numbers")
        return notes

    def _seed(self, step: int) -> None:
        """Seed this rank's own generator (dropout; everything else is counter-based) anew from a step on."""
        torch.manual_seed(hash((self.recipe.training.seed, step, self.world.size, self.world.rank)))


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
