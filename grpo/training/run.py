"""What every training job has: a folder, an observer, checkpoints and a step counter."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from grpo.checkpoint import CheckpointManager, ExtraState
from grpo.config import TrainingRecipe, UserError, is_url
from grpo.data import ImageStream
from grpo.estimate import Work, device_peaks, throughput
from grpo.observe import PhaseTimer, RunObserver
from grpo.parallel import (
    MetricSums,
    World,
    build_mesh,
    gather_numbers,
    require_backend,
    set_matmul_precision,
)
from grpo.position import position
from grpo.rewards import Seen
from grpo.training.banner import closing, opening
from grpo.training.export import export
from grpo.training.fingerprints import take_fingerprints
from grpo.training.judge import RunJudge, Verdict
from grpo.training.micro_batch import sized_for
from grpo.training.optimizer import GuardedOptimizer
from grpo.training.resume import NO_STATE, canonical, find_checkpoint, read_run_state, require_classes
from grpo.training.run_lock import lock_folder
from grpo.training.skipped import SkippedSteps
from grpo.training.step_trace import traced
from grpo.training.stop_request import StopRequest
from grpo.training.stragglers import Stragglers, own_work
from grpo.training.watchdog import Watchdog

NO_WORK = Work()
Watch = Callable[[Mapping[str, float]], Seen]
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
        recipe: with the sizes that were left to be chosen.
        mesh: the ranks, as the recipe arranges them.
        timer: phases of a step, see `PhaseTimer`.
        observer: where images and messages go.
    """

    def __init__(self, recipe: TrainingRecipe, world: World, *, title: str) -> None:
        self.recipe, self._notes = sized_for(recipe, world)
        self.world, self.title = world, title
        require_backend(recipe.training.kernels, world.device, key="training.kernels")
        # Of now: a user's code may go to another folder later.
        self.run_dir, place = recipe.run_dir.absolute(), recipe.checkpoint_dir
        self.checkpoint_dir = place if is_url(place) else str(Path(place).absolute())
        set_matmul_precision(recipe.training.mixed_precision)
        self.mesh = build_mesh(recipe.parallel, world)
        # A collective that waits for a rank in vain ends first, and says more.
        seconds, beat = recipe.parallel.timeout + 5.0, self.run_dir / "heartbeat.json" if world.is_main else None
        self._watchdog = Watchdog(seconds, rank=world.rank, heartbeat=beat)
        self._stragglers = Stragglers()
        self.timer = PhaseTimer(world.device, on_phase=self._watchdog.phase_begins)
        self.checkpoints = CheckpointManager(
            self.checkpoint_dir,
            world=world,
            config=recipe.checkpoint,
            timeout_seconds=recipe.parallel.timeout,
            stage=self.run_dir / ".stage",
        )
        self._open = ExitStack()  # what is given back when the run ends
        self._stop_request = StopRequest(speaks=world.is_main)
        self._best_values: list[float] = []
        self._is_done = False  # the last step was taken
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
        judge: RunJudge | None = None,
        extra: Mapping[str, ExtraState] | None = None,
    ) -> None:
        """Resume if there is something to resume from, and open the observer.

        Args:
            model: parallelized; the state of everything here is overwritten by the checkpoint's.
            stream: the images; goes on after the last one that the checkpoint has consumed.
            judge: evaluates the run now and then, first of all before its first step.
            extra: by name, what else the run goes on from.

        Raises:
            UserError: the checkpoint belongs to another run or to a recipe that differs in a way that matters.
        """
        self._model, self._optimizer, self._stream, self._judge = model, optimizer, stream, judge
        self._extra = dict(extra or {}) | ({} if optimizer.average is None else {"ema": optimizer.average})
        self._extra |= {} if judge is None else {"judge": judge}
        self._stop_request.listen(until=self._open)
        if self.world.is_main:  # what the others do with checkpoints waits for what the main rank finds
            lock = lock_folder(self.run_dir, wait_seconds=self.recipe.parallel.timeout / 2)
            self._open.enter_context(lock)
        if self.recipe.checkpoint.interval or self.recipe.checkpoint.save_final:
            self.checkpoints.check_writable()
            self._lock_checkpoints()
        self._fingerprints, told = take_fingerprints(self.recipe, stream.dataset, self.world)
        notes = [*self._notes, *self.recipe.notes(), *self.recipe.remarks(), *stream.dataset.remarks, *told]
        path, named = find_checkpoint(self.recipe, self.checkpoints, notes.append)
        if path is not None:
            notes += self._resume(path, named=named)
        self._skipped = SkippedSteps(optimizer)
        *about, places = opening(self.recipe, model, self.world, title=self.title)
        observer = RunObserver(
            self.run_dir,
            self.recipe.metrics,
            total_steps=self.recipe.training.steps,
            recipe_text=self.recipe.to_toml(),
            title=self.title,
            main=self.world.is_main,
            start_step=self._first_step,
            about=about,
            where=self._where,
        )
        self.observer = self._open.enter_context(observer)
        for line in (places, *notes):
            self.observer.message(line)
        self._watchdog.start(until=self._open)
        if judge is not None and path is None:
            judged = self._judged(0)
            seconds = self.timer.read()["seconds/judge"]
            judge.note(None, seconds)
            judge.record(seconds)
            self._tell_judged("before the first step", judged)

    def _where(self) -> str:
        """How far the step is, for a terminal; another thread asks."""
        return ", ".join(filter(None, (self._watchdog.phase, position())))

    def _lock_checkpoints(self) -> None:
        """Keep other runs out of a folder of checkpoints that is not inside this run's, which is locked already."""
        place = self.checkpoint_dir
        if self.world.is_main and not is_url(place) and Path(place).parent != self.run_dir:
            self._open.enter_context(lock_folder(Path(place), wait_seconds=self.recipe.parallel.timeout / 2))

    def steps(self) -> Iterator[int]:
        """The steps still to be done, counted from 1."""
        total = self.recipe.training.steps
        if self._first_step >= total:
            self.observer.message(
                f"nothing to do: {self.recipe.run_dir} is at step {self._first_step} of {total}; raise training.steps "
                "to go on, or give another metrics.run_dir to start anew"
            )
            if self._exports:  # what ended the start before may have been the writing of just that
                export(self.run_dir, self._model, self._optimizer.average, self.world)
        device_peaks(self.world.device)  # it may take a moment
        self.timer.read()  # do not count the set-up
        for step in range(self._first_step + 1, total + 1):
            self._skipped.step_begins()
            self._seed(step)
            self._watchdog.step_begins(step)
            wanted, tell = self.recipe.debug.profile, self.observer.message
            with traced(self.run_dir, step, world=self.world, wanted=wanted, tell=tell):
                yield step

    def finish(
        self,
        step: int,
        sums: MetricSums,
        *,
        images: int,
        codes: int = 0,
        work: Work = NO_WORK,
        watch: Watch = lambda metrics: Seen([]),
    ) -> None:
        """Write a step down, and a checkpoint when it is due.

        Args:
            sums: the metrics of this rank; they are added up over ranks here.
            images: images that all ranks together trained on in this step, for the rate.
            codes, work: of one image, and of this rank's step by phase, where the job has them; see `throughput`.
            watch: looks at the metrics and says what to tell the user, and why the run must stop if it must. Every
                rank must come to the same verdict, so it looks at no time for that.

        Raises:
            UserError: too many optimizer steps in a row were skipped, or all of them, or `watch` stops the run; there
                is a checkpoint of this step.
        """
        metrics, last = sums.means(), step == self.recipe.training.steps
        is_due = self._judge is not None and self._judge.due(step, last=last)
        judged = self._judged(step) if is_due else {}
        times = self.timer.read()
        working = {**times, "seconds/step": times["seconds/step"] - times.get("seconds/judge", 0.0)}
        rates = throughput(working, images=images, codes=codes, work=work, device=self.world.device)
        vote = _SAVE_FAILED if self.checkpoints.failed() else int(self._stop_request.reason is not None)
        votes, own_seconds = gather_numbers([vote, own_work(times)]).unbind(1)  # each [ranks]
        vote, slowest = int(votes.max()), self._stragglers.look(own_seconds)
        verdict = self._heard(metrics, times, is_due)
        if is_due:
            self._tell_judged(f"step {step}", judged)
        judged |= {"judge/time_share": self._judge.time_share} if is_due else {}
        values = {**metrics, **judged, **rates, **times, **slowest.metrics}
        self.observer.log(step, values)
        seen = watch(values)
        skipped = self._skipped.note(metrics, seen.not_finite)
        for note in (*seen.notes, *verdict.notes, *slowest.warnings, *([] if skipped is None else [skipped])):
            self.observer.message(f"step {step}: {note}")
        self._note_best({**metrics, **judged})
        config = self.recipe.checkpoint
        problem = (
            seen.problem or verdict.problem or (self._skipped.idle(seen.not_finite) or seen.if_last if last else None)
        )
        if vote == _SAVE_FAILED:
            self.checkpoints.wait()  # raises
        stopping = self._optimizer.stuck or problem is not None or (vote == _STOP and not last)
        if stopping or (last and config.save_final) or (config.interval > 0 and step % config.interval == 0):
            with self.timer("checkpoint"):
                self.save(step)
        if stopping:
            self.checkpoints.wait()
            self._stop(step, problem)
        if last and self._exports:
            self.checkpoints.wait()  # the work of the run is safe before anything else can fail
            export(self.run_dir, self._model, self._optimizer.average, self.world)
        self._is_done = last

    def _judged(self, step: int) -> dict[str, float]:
        """What the judge says of the weights as they are, or of their moving average where there is one."""
        average = self._optimizer.average
        with self.timer("judge"), nullcontext() if average is None else average.swapped():
            return self._judge(step)

    def _tell_judged(self, when: str, judged: Mapping[str, float]) -> None:
        self.observer.message(f"{when}: {', '.join(f'{name} {value:.4g}' for name, value in judged.items())}")

    def _heard(self, metrics: Mapping[str, float], times: Mapping[str, float], is_due: bool) -> Verdict:
        """Tell the judge of a step, and what it makes of it where it has looked at it."""
        if self._judge is None:
            return Verdict([])
        self._judge.note(metrics.get("reward_mean"), times["seconds/step"])
        return self._judge.record(times["seconds/judge"]) if is_due else Verdict([])

    @property
    def _exports(self) -> bool:
        """Whether the run ends with its weights in files of their own."""
        return self.recipe.checkpoint.save_final and not self.recipe.checkpoint.sharded

    def _stop(self, step: int, problem: str | None) -> NoReturn:
        """End the run after its checkpoint of this step."""
        if problem is not None:
            raise UserError(f"stopped at step {step}: {problem}. Its checkpoint is in {self.recipe.checkpoint_dir}")
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
        interrupted = self._stop_request.signal is signal.SIGINT
        raise Terminated(128 + (signal.SIGINT if interrupted else signal.SIGTERM))

    def save(self, step: int) -> None:
        """Write a checkpoint, in the background if the recipe says so."""
        run_state = {
            "step": step,
            **self._counts(),
            "recipe": self.recipe.to_toml(),
            "run_dir": str(self.recipe.run_dir),
            "fingerprints": self._fingerprints,
            "resumed_from": self._resumed_from,
            "class_names": getattr(self._model.config, "class_names", None),
        }
        best, self._best_values = self._best_values, []
        trained = {"model": self._model, "optimizer": self._optimizer.adamw}
        score = sum(best) / len(best) if best else None
        states = {"run_state": run_state, "extra": self._extra}
        self.checkpoints.save(step, **trained, **states, score=score)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.checkpoints.close()
            if self._is_done and self.world.is_main:
                for line in closing(self.recipe, self.checkpoints.best()):
                    self.observer.message(line)
        self._open.__exit__(kind, *error)

    def _note_best(self, metrics: Mapping[str, float]) -> None:
        config = self.recipe.checkpoint
        if not config.keep_best:
            return
        if config.best_metric not in metrics:
            if config.best_metric.startswith("judge/") and not any(name.startswith("judge/") for name in metrics):
                return  # between two evaluations
            known = ", ".join(sorted(metrics))
            raise UserError(f"checkpoint.best_metric: this job has no metric {config.best_metric!r}; it has {known}")
        if config.best_metric.startswith("judge/"):
            self._best_values = []  # the newest evaluation alone: those before saw other weights
        if math.isfinite(value := metrics[config.best_metric]):
            self._best_values.append(value)

    def _resume(self, path: Path, *, named: bool) -> list[str]:
        """Take over a checkpoint; what to tell the user about it."""
        own = {"step": 0, **self._counts()}
        state, changes = read_run_state(
            self.recipe, self.checkpoints, path, named=named, fingerprints=self._fingerprints, own=own
        )
        place = self.checkpoints.place_of(path)
        require_classes(place, state.get("class_names"), getattr(self._model.config, "class_names", None))
        trained = {"model": self._model, "optimizer": self._optimizer.adamw, "extra": self._extra}
        self.checkpoints.load(path, **trained)
        if missing := [name for name, _ in self._counted() if name not in state["extra"]]:
            raise UserError(f"{place} has no state of {missing[0]}: use the recipe that wrote it")
        try:
            self._optimizer.load_state_dict(state["optimizer_step"])
            self._stream.load_state_dict(state["stream"])
            for name, counted in self._counted():
                counted.load_state_dict(state["extra"][name])
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:  # crafted
            raise UserError(f"{place}: {NO_STATE}") from error
        self._first_step = state["step"]
        self._resumed_from = canonical(self.recipe.checkpoint.resume) if named else state.get("resumed_from")
        return [f"resumed from {place}", *(f"changed since then: {line}" for line in changes)]

    def _counts(self) -> dict[str, Any]:
        """What a run goes on from beside tensors: counters, and the place in the data."""
        return {
            "stream": self._stream.state_dict(),
            "optimizer_step": self._optimizer.state_dict(),
            "extra": {name: state.state_dict() for name, state in self._counted()},
        }

    def _counted(self) -> list[tuple[str, Any]]:
        """Those of the extra states that have counters besides their tensors."""
        return [(name, state) for name, state in self._extra.items() if hasattr(state, "load_state_dict")]

    def _seed(self, step: int) -> None:
        """Seed this rank's generator for a step, so that what draws from it, such as a user's reward, does in a resumed
        run what it does in an uninterrupted one. What the project draws for images is a function of their numbers."""
        torch.manual_seed(hash((self.recipe.training.seed, step, self.world.size, self.world.rank)))
