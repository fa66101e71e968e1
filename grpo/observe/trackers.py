"""Other programs that show a run: Weights & Biases and TensorBoard. Neither is imported unless it is asked for."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import tomli
from PIL import Image

from grpo.config import Metrics, UserError, reading, writing

EVENTS_NAME = "tensorboard"  # folder of the event files, inside the run's
WANDB_ID_NAME = "wandb_run_id.txt"


class Tracker(Protocol):
    """Takes what a run shows."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step."""

    def images(self, step: int, grid: Image.Image, caption: str) -> None:
        """A grid of a step's samples."""

    def close(self) -> None:
        """The run has ended."""


def require_trackers(metrics: Metrics) -> None:
    """Raise a UserError if a package is missing for what the section asks for."""
    if metrics.wandb and find_spec("wandb") is None:
        raise UserError(
            "metrics.wandb is true but the package wandb is not installed: pip install wandb, or set it to false"
        )
    if metrics.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "metrics.tensorboard is true but the package tensorboard is not installed: "
            "pip install 'autoregressive-grpo[tensorboard]', or set it to false"
        )


def build_trackers(run_dir: Path, metrics: Metrics, *, recipe_text: str, start_step: int) -> list[Tracker]:
    """The trackers that the section asks for, which go on after `start_step`. A UserError: one does not start."""
    trackers: list[Tracker] = []
    if metrics.wandb:
        remedy = "WANDB_MODE=offline needs no key and no network; or set metrics.wandb to false"
        with reading("metrics.wandb: Weights & Biases does not start", remedy=remedy):
            trackers.append(WandbTracker(run_dir, metrics, recipe_text=recipe_text))
    if metrics.tensorboard:
        with writing(f"metrics.tensorboard: {run_dir / EVENTS_NAME}"):
            trackers.append(TensorBoardTracker(run_dir, recipe_text=recipe_text, start_step=start_step))
    return trackers


class WandbTracker:
    """A run of Weights & Biases, with the recipe as its configuration: tables in tables, key by key.

    Offline unless the environment says otherwise: WANDB_MODE is obeyed, and WANDB_API_KEY alone means online. A run
    that is continued goes on under the id kept in `wandb_run_id.txt`.
    """

    def __init__(self, run_dir: Path, metrics: Metrics, *, recipe_text: str) -> None:
        import wandb

        id_file = run_dir / WANDB_ID_NAME
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        recipe = tomli.loads(recipe_text)
        self._picture = wandb.Image
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run: Any = wandb.init(
            project=metrics.wandb_project,
            entity=metrics.wandb_entity,
            name=metrics.wandb_run_name or run_dir.resolve().name,
            group=metrics.wandb_group,
            tags=metrics.wandb_tags,
            job_type=recipe.get("job"),
            id=id_file.read_text().strip(),
            resume="allow",
            dir=run_dir,
            mode=mode,
            config=recipe,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def images(self, step: int, grid: Image.Image, caption: str) -> None:
        self._run.log({"samples": self._picture(grid, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """Event files in the run's folder. What an earlier start has written of steps after `start_step`, whose work is
    repeated, TensorBoard drops when it reads the files."""

    def __init__(self, run_dir: Path, *, recipe_text: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / EVENTS_NAME), purge_step=start_step + 1)
        indented = "".join(f"    {line}\n" for line in recipe_text.splitlines())  # as Markdown has plain text
        self._writer.add_text("recipe", indented, start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed has what its log has

    def images(self, step: int, grid: Image.Image, caption: str) -> None:
        self._writer.add_image("samples", np.asarray(grid.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
