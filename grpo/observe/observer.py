"""RunObserver: the one place where a run reports what it does."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self

from grpo.config import Metrics, UserError, printable
from grpo.observe.console import ProgressDisplay
from grpo.observe.files import MetricsFile, metric_lines, write_atomically
from grpo.observe.grids import SampleRow, sample_grid, sample_grids
from grpo.observe.history import History
from grpo.observe.report import write_run_report
from grpo.observe.trackers import EVENTS_NAME, WANDB_ID_NAME, build_trackers, require_trackers

# What a run writes into its folder besides checkpoints, which guard themselves.
RUN_FILES = ("recipe.toml", "metrics.jsonl", "log.txt", "report.html", "samples", "judge.json", "model.safetensors",
             "model_ema.safetensors", "discriminator.safetensors", WANDB_ID_NAME, EVENTS_NAME)  # fmt: skip


class RunObserver:
    """Writes a run's folder and shows its progress.

    Only the main rank writes; on the others every method does nothing, so that callers need no `if`.

    Args:
        run_dir: the run's folder, made when missing.
        total_steps: steps of the whole run.
        recipe_text: the resolved recipe as TOML.
        title: name of the job in the bar and the report.
        main: whether this rank writes.
        start_step: the step that the run continues from; lines of metrics.jsonl after it are dropped. 0 is a new run:
            what an older one has left is moved into `previous/`.
        about: lines that say what runs, for the console, the log and the report.
        where: says how far a step is, for a terminal, which shows it while steps are long.

    Raises:
        UserError: the folder cannot be written, or a tracker is asked for and not installed (on every rank).
    """

    def __init__(
        self,
        run_dir: str | Path,
        metrics: Metrics,
        *,
        total_steps: int,
        recipe_text: str,
        title: str,
        main: bool,
        start_step: int = 0,
        about: Iterable[str] = (),
        where: Callable[[], str] = str,
    ) -> None:
        self.run_dir, self.main = Path(run_dir), main
        self._settings, self._title, self._total_steps = metrics, title, total_steps
        self._step, self._recipe = start_step, recipe_text
        self._about = [printable(line) for line in about]
        require_trackers(metrics)
        if not main:
            return
        try:
            aside = set_aside(self.run_dir, recipe_text) if start_step == 0 else None
            (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_dir / "recipe.toml", recipe_text)
            self._metrics_file = MetricsFile(self.run_dir / "metrics.jsonl", start_step=start_step)
            self._history = History.read(self.run_dir / "metrics.jsonl")
            self._log_file = (self.run_dir / "log.txt").open("a", encoding="utf-8")
        except OSError as error:
            problem = f"cannot write to the run's folder {self.run_dir}: {error.strerror}; set metrics.run_dir"
            raise UserError(problem) from error
        self._trackers = build_trackers(self.run_dir, metrics, recipe_text=recipe_text, start_step=start_step)
        self._display = ProgressDisplay(title, total_steps, start=start_step, where=where)
        self._note(f"{title}: from step {start_step} to {total_steps}")
        for line in self._about:
            self.message(line)
        if aside is not None:
            self.message(f"the results of an earlier run in {self.run_dir} are now in {aside}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a finished step (1-based), already reduced over ranks."""
        if not self.main:
            return
        self._step = step
        self._metrics_file.write(step, metrics)
        self._history.add(step, {name: value for name, value in metrics.items() if math.isfinite(value)})
        due = step % self._settings.interval == 0 or step == self._total_steps
        self._display.update(step, metrics, line=due)
        if due:
            self._note(self._display.line(step, metrics))
            for tracker in self._trackers:
                tracker.log(step, metrics)

    def wants_images(self, step: int) -> bool:
        """Whether a grid is due, the same on every rank: every `image_interval` steps, at the first and the last."""
        interval = self._settings.image_interval
        return interval > 0 and (step % interval == 0 or step in (1, self._total_steps))

    def images(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Draws a grid of the step's rollouts into samples/ and to the trackers, and refreshes the report."""
        if not self.main or not rows:
            return
        grid = sample_grid(rows)
        grid.save(self.run_dir / "samples" / f"step-{step:06d}.png")
        self._prune_grids()
        for tracker in self._trackers:
            tracker.images(step, grid, caption=", ".join(row.caption for row in rows))
        self._report(f"running, step {step} of {self._total_steps}")

    def message(self, text: str) -> None:
        """Prints a line and adds it to log.txt; names in it may be of files from anywhere."""
        if self.main:
            text = printable(text)
            self._display.message(text)
            self._note(text)

    def close(self, *, status: str = "finished") -> None:
        """Ends the bar and the files and writes the report."""
        if not self.main:
            return
        self._display.close()
        self._note(f"{status} at step {self._step}")
        self._report(f"{status}, step {self._step} of {self._total_steps}")
        self._metrics_file.close()
        self._log_file.close()
        for tracker in self._trackers:
            tracker.close()

    def _report(self, summary: str) -> None:
        write_run_report(
            self.run_dir,
            title=f"{self._title}: {self.run_dir.resolve().name}",
            summary=summary,
            about=self._about,
            history=self._history,
            recipe=self._recipe,
        )

    def _prune_grids(self) -> None:
        """Of more grids than `keep_grids` those go whose neighbours are closest, never the first or the newest.

        So what is left stays spread over the whole run; to drop every other one each time would leave its end alone.
        """
        most, grids = self._settings.keep_grids, sample_grids(self.run_dir / "samples")
        while most and len(grids) > max(most, 2):
            dense = min(range(1, len(grids) - 1), key=lambda i: grids[i + 1][0] - grids[i - 1][0])
            grids.pop(dense)[1].unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(status="finished" if kind is None else f"stopped by {kind.__name__}")

    def _note(self, text: str) -> None:
        self._log_file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
        self._log_file.flush()


def set_aside(run_dir: Path, recipe_text: str) -> Path | None:
    """Moves what an earlier run has left in `run_dir` into a new folder there and returns that; None if nothing is.

    A recipe.toml of other text counts: it may be the user's own, with comments.
    """
    recipe, weights = run_dir / "recipe.toml", [name for name in RUN_FILES if name.endswith(".safetensors")]
    left = any((run_dir / name).exists() for name in weights)
    left = left or (recipe.exists() and recipe.read_bytes() != recipe_text.encode())
    if not left and next(metric_lines(run_dir / "metrics.jsonl"), None) is None:
        return None
    (run_dir / "previous").mkdir(exist_ok=True)
    number = 1 + max((int(path.name) for path in (run_dir / "previous").iterdir() if path.name.isdecimal()), default=0)
    aside = run_dir / "previous" / str(number)
    aside.mkdir()
    for name in RUN_FILES:
        if (run_dir / name).exists():
            (run_dir / name).replace(aside / name)
    return aside
