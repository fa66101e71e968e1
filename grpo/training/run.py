"""What every training job has: a folder, an observer, checkpoints and a step counter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn

from grpo.checkpoint import CheckpointManager
from grpo.config import TrainingRecipe, UserError, differences, recipe_from_toml
from grpo.data import ImageStream
from grpo.models import save_weights
from grpo.observe import PhaseTimer, RunObserver
from grpo.parallel import World, full_state_dict
from grpo.training.optimizer import OptimizerStep
from grpo.training.throughput import Work, device_peaks, throughput

EXPORT_NAME = "model.safetensors"

# Sections and keys that a resumed run may change: they move work around, they do not change it.
FREE_SECTIONS = ("parallel.", "compile.", "activation_checkpoint.", "checkpoint.", "metrics.", "debug.")
FREE_KEYS = ("training.steps", "training.max_skipped_steps", "data.num_workers", "data.cache_codes",
             "data.max_bad_images", "reward.batch_size", "rollout.max_rows")  # fmt: skip


class TrainingRun:
    """The life of one training job on this rank.

        with TrainingRun(recipe, world, title="GRPO") as run:
            run.start(model=model, step=optimizer_step, stream=stream)
            for step in run.steps():
                ...
                run.finish(step, metrics)

    Attributes:
        timer: phases of a step, see `PhaseTimer`.
        observer: where images and messages go.
    """

    def __init__(self, recipe: TrainingRecipe, world: World, *, title: str) -> None:
        self.recipe, self.world, self.title = recipe, world, title
        self.total_steps = recipe.training.steps
        self.timer = PhaseTimer(world.device)
        self.checkpoints = CheckpointManager(
            recipe.checkpoint_dir,
            world=world,
            sharded=recipe.checkpoint.sharded,
            keep_last=recipe.checkpoint.keep_last,
            async_save=recipe.checkpoint.async_save,
        )
        if recipe.debug.deterministic:
            torch.use_deterministic_algorithms(True)
        self._first_step = 0

    def start(self, *, model: nn.Module, step: OptimizerStep, stream: ImageStream) -> None:
        """Resume if there is something to resume from, and open the observer.

        Args:
            model: parallelized; its weights, the optimizer and the stream are overwritten by the checkpoint's.
            step: the optimizer step with its counters.
            stream: the images; goes on after the last one that the checkpoint has consumed.

        Raises:
            UserError: the checkpoint belongs to another run or to a recipe that differs in a way that matters.
        """
        self._model, self._step, self._stream = model, step, stream
        self._seed(0)
        notes = self.recipe.notes()
        path = self._resume_path()
        if path is not None:
            notes += self._resume(path)
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
        metrics: Mapping[str, float],
        *,
        images: int,
        codes: int = 0,
        work: Work = Work(),  # noqa: B008 - immutable
    ) -> None:
        """Write a step down, and a checkpoint when it is due.

        Args:
            metrics: means over all ranks.
            images: images that all ranks together trained on in this step, for the rate.
            codes, work: of one image, and of this rank's step by phase, where the job has them; see `throughput`.

        Raises:
            UserError: too many optimizer steps in a row were skipped; there is a checkpoint of this step.
        """
        times = self.timer.read()
        rates = throughput(times, images=images, codes=codes, work=work, device=self.world.device)
        self.observer.log(step, {**metrics, **rates, **times})
        config, last = self.recipe.checkpoint, step == self.total_steps
        if last and config.save_final and not config.sharded:
            self._export()
        stopping = self._step.stuck
        if stopping or (last and config.save_final) or (config.interval > 0 and step % config.interval == 0):
            with self.timer("checkpoint"):
                self.save(step)
        if stopping:
            self.checkpoints.wait()
            raise UserError(
                f"stopped at step {step}: {self._step.skipped_in_a_row} optimizer steps in a row had a non-finite loss "
                f"or gradient and were skipped; the weights before them are in {self.recipe.checkpoint_dir}. Lower "
                "optimizer.lr, look at the rewards in metrics.jsonl, or raise training.max_skipped_steps"
            )

    def save(self, step: int) -> None:
        """Write a checkpoint, in the background if the recipe says so."""
        self.checkpoints.save(
            step,
            model=self._model,
            optimizer=self._step.optimizer,
            run_state={
                "step": step,
                "stream": self._stream.state_dict(),
                "optimizer_step": self._step.state_dict(),
                "recipe": self.recipe.to_toml(),
                "run_dir": str(self.recipe.run_dir),
            },
            rank_state=_rng_state(self.world.device),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.checkpoints.close()
        if hasattr(self, "observer"):
            self.observer.__exit__(kind, error, traceback)

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
            save_weights(self.recipe.run_dir / EXPORT_NAME, weights)

    def _resume_path(self) -> str | None:
        """The checkpoint to go on from, None to start anew."""
        resume = self.recipe.checkpoint.resume
        if resume not in ("auto", "none"):
            return resume
        latest = self.checkpoints.latest()
        if latest is not None and resume == "none":
            raise UserError(
                f"checkpoint.resume = none: {self.recipe.checkpoint_dir} already holds checkpoints, which a new run "
                "would overwrite; give another metrics.run_dir or checkpoint.dir, or remove them"
            )
        return None if latest is None else str(latest)

    def _resume(self, path: str) -> list[str]:
        state = self.checkpoints.read_run_state(path)
        explicit = self.recipe.checkpoint.resume == path
        inside = self.recipe.checkpoint_dir.parent == self.recipe.run_dir
        if not explicit and not inside and state["run_dir"] != str(self.recipe.run_dir):
            raise UserError(
                f"{self.recipe.checkpoint_dir} holds checkpoints of the run {state['run_dir']}: give this run another "
                f"checkpoint.dir, or go on from it with checkpoint.resume = {path}"
            )
        changes = [
            line
            for line in differences(recipe_from_toml(type(self.recipe), state["recipe"]), self.recipe)
            if not line.startswith((*FREE_SECTIONS, *FREE_KEYS))
        ]
        if changes and not explicit:
            raise UserError(
                [f"{path} was written by a recipe that differs ({len(changes)} keys); change them back, give another "
                 "metrics.run_dir, or name the checkpoint in checkpoint.resume to go on with the changes:", *changes]
            )  # fmt: skip
        rank_state = self.checkpoints.load(path, model=self._model, optimizer=self._step.optimizer)
        self._step.load_state_dict(state["optimizer_step"])
        self._stream.load_state_dict(state["stream"])
        self._first_step = state["step"]
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
