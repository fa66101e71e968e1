"""What every training job has: a folder, an observer, checkpoints and a step counter."""

import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from grpo.checkpoint import CheckpointManager, ExtraState
from grpo.config import TrainingRecipe, UserError
from grpo.data import ImageStream
from grpo.estimate import Work, device_peaks, throughput
from grpo.models import save_weights
from grpo.observe import PhaseTimer, RunObserver
from grpo.parallel import MetricSums, World, all_reduce_max, build_mesh, full_state_dict, set_matmul_precision
from grpo.training.optimizer import GuardedOptimizer
from grpo.training.resume import find_checkpoint, read_run_state, require_classes
from grpo.training.run_lock import lock_folder
from grpo.training.stop_request import StopRequest

EXPORT_NAME = "model.safetensors"
AVERAGE_NAME = "model_ema.safetensors"  # the moving average of the weights, where there is one
NO_WORK = Work()
_STOP, _SAVE_FAILED = 1, 2  # what a rank votes for after a step, or 0; the highest vote wins


class Terminated(SystemExit):
    """The run was asked to stop and has done so, with a checkpoint."""


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
        set_matmul_precision(recipe.training.mixed_precision)
        self.mesh = build_mesh(recipe.parallel, world)
        self.timer = PhaseTimer(world.device)
        self.checkpoints = CheckpointManager(
            recipe.checkpoint_dir, world=world, config=recipe.checkpoint, timeout_seconds=recipe.parallel.timeout
        )
        self._open = ExitStack()  # what is given back when the run ends
        self._stop_request = StopRequest()
        self._best_values: list[float] = []
        self._resumed_from: str | None = None
        self._first_step = 0
        if recipe.debug.deterministic:
            torch.use_deterministic_algorithms(True)

    def start(
        self,
        *,
        model: nn.Module,
        optimizer: GuardedOptimizer,
        stream: ImageStream,
        extra: Mapping[str, ExtraState] | None = None,
    ) -> None:
        """Resume if there is something to resume from, and open the observer.

        Args:
            model: parallelized; the state of everything here is overwritten by the checkpoint's.
            stream: the images; goes on after the last one that the checkpoint has consumed.
            extra: by name, what else the run goes on from.

        Raises:
            UserError: the checkpoint belongs to another run or to a recipe that differs in a way that matters.
        """
        self._model, self._optimizer, self._stream = model, optimizer, stream
        self._extra = dict(extra or {}) | ({} if optimizer.average is None else {"ema": optimizer.average})
        self._stop_request.listen(until=self._open)
        if self.world.is_main:  # what the others do with checkpoints waits for what the main rank finds
            lock = lock_folder(self.recipe.run_dir, wait_seconds=self.recipe.parallel.timeout / 2)
            self._open.enter_context(lock)
        if self.recipe.checkpoint.interval or self.recipe.checkpoint.save_final:
            self.checkpoints.check_writable()
        self._seed(0)
        notes = self.recipe.notes()
        path, named = find_checkpoint(self.recipe, self.checkpoints, notes.append)
        if path is not None:
            notes += self._resume(path, named=named)
        observer = RunObserver(
            self.recipe.run_dir,
            self.recipe.metrics,
            total_steps=self.recipe.training.steps,
            recipe_text=self.recipe.to_toml(),
            title=self.title,
            main=self.world.is_main,
            start_step=self._first_step,
        )
        self.observer = self._open.enter_context(observer)
        for note in notes:
            self.observer.message(note)

    def steps(self) -> Iterator[int]:
        """The steps still to be done, counted from 1."""
        total = self.recipe.training.steps
        if self._first_step >= total:
            self.observer.message(
                f"nothing to do: {self.recipe.run_dir} is at step {self._first_step} of {total}; raise training.steps "
                "to go on, or give another metrics.run_dir to start anew"
            )
        device_peaks(self.world.device)  # it may take a moment
        self.timer.read()  # do not count the set-up
        for step in range(self._first_step + 1, total + 1):
            self._skipped_before = self._optimizer.skipped
            with self._traced(step):
                yield step

    def finish(self, step: int, sums: MetricSums, *, images: int, codes: int = 0, work: Work = NO_WORK) -> None:
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
        config, last = self.recipe.checkpoint, step == self.recipe.training.steps
        vote = all_reduce_max(_SAVE_FAILED if self.checkpoints.failed() else int(self._stop_request.reason is not None))
        if vote == _SAVE_FAILED:
            self.checkpoints.wait()  # raises
        stopping = self._optimizer.stuck or (vote == _STOP and not last)
        if stopping or (last and config.save_final) or (config.interval > 0 and step % config.interval == 0):
            with self.timer("checkpoint"):
                self.save(step)
        if stopping:
            self.checkpoints.wait()
            self._stop(step)
        if last and config.save_final and not config.sharded:
            self.checkpoints.wait()  # the work of the run is safe before anything else can fail
            self._export()

    def _export(self) -> None:
        """Write the weights under names that do not change with the number of steps, for the next job."""
        self._write_weights(EXPORT_NAME)
        if self._optimizer.average is not None:
            with self._optimizer.average.swapped():
                self._write_weights(AVERAGE_NAME)

    def _write_weights(self, name: str) -> None:
        weights = full_state_dict(self._model)
        if self.world.is_main:
            save_weights(self.recipe.run_dir / name, weights, config=self._model.config)

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
        raise Terminated(128 + signal.SIGTERM)

    def save(self, step: int) -> None:
        """Write a checkpoint, in the background if the recipe says so."""
        run_state = {
            "step": step,
            "stream": self._stream.state_dict(),
            "optimizer_step": self._optimizer.state_dict(),
            "extra": {name: state.state_dict() for name, state in self._counted()},
            "recipe": self.recipe.to_toml(),
            "run_dir": str(self.recipe.run_dir),
            "resumed_from": self._resumed_from,
            "class_names": getattr(self._model.config, "class_names", None),
        }
        generators = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.world.device)
        best, self._best_values = self._best_values, []
        trained = {"model": self._model, "optimizer": self._optimizer.adamw}
        score = sum(best) / len(best) if best else None
        states = {"run_state": run_state, "rank_state": generators, "extra": self._extra}
        self.checkpoints.save(step, **trained, **states, score=score)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.checkpoints.close()
        self._open.__exit__(kind, *error)

    def _note_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say that an optimizer step was skipped and what was not finite."""
        if self._optimizer.skipped == self._skipped_before:
            return
        seen = (name for name in ("reward_mean", "loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0)))
        self.observer.message(
            f"step {step}: {next(seen, 'a gradient')} is not finite, the optimizer step was skipped "
            f"({self._optimizer.skipped} so far, {self._optimizer.skipped_in_a_row} in a row)"
        )

    def _note_best(self, metrics: Mapping[str, float]) -> None:
        config = self.recipe.checkpoint
        if not config.keep_best:
            return
        if config.best_metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise UserError(f"checkpoint.best_metric: this job has no metric {config.best_metric!r}; it has {known}")
        if math.isfinite(value := metrics[config.best_metric]):
            self._best_values.append(value)

    @contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        """Record the step if it is the one that the recipe wants a trace of: the trace, and a table of its times."""
        if step != self.recipe.debug.profile:
            yield
            return
        with torch.profiler.profile() as profiler:
            yield
        path = self.recipe.run_dir / f"trace-step-{step:06d}-rank-{self.world.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)  # the main rank has made it on its own host only
        profiler.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        path.with_suffix(".txt").write_text(table)
        self.observer.message(f"trace of step {step}: {path}")

    def _resume(self, path: Path, *, named: bool) -> list[str]:
        """Take over a checkpoint; what to tell the user about it."""
        state, changes = read_run_state(self.recipe, self.checkpoints, path, named=named)
        require_classes(path, state.get("class_names"), getattr(self._model.config, "class_names", None))
        trained = {"model": self._model, "optimizer": self._optimizer.adamw, "extra": self._extra}
        generators = self.checkpoints.load(path, **trained)
        self._optimizer.load_state_dict(state["optimizer_step"])
        self._stream.load_state_dict(state["stream"])
        for name, counted in self._counted():
            if name not in state.get("extra", {}):
                raise UserError(f"{path} has no state of {name}: use the recipe that wrote it")
            counted.load_state_dict(state["extra"][name])
        self._first_step = state["step"]
        self._resumed_from = os.path.realpath(path) if named else state.get("resumed_from")
        notes = [f"resumed from {path}", *(f"changed since then: {line}" for line in changes)]
        if generators is None:
            self._seed(self._first_step)
            return [*notes, "the number of ranks has changed: dropout, if any, goes on with new random numbers"]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], self.world.device)
        return notes

    def _counted(self) -> list[tuple[str, Any]]:
        """Those of the extra states that have counters besides their tensors."""
        return [(name, state) for name, state in self._extra.items() if hasattr(state, "load_state_dict")]

    def _seed(self, step: int) -> None:
        """Seed this rank's own generator (dropout; everything else is counter-based) anew from a step on."""
        torch.manual_seed(hash((self.recipe.training.seed, step, self.world.size, self.world.rank)))
