"""Weights & Biases, imported only when a run asks for it."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from grpo.config import Metrics, UserError


def require_wandb(metrics: Metrics) -> None:
    """Ends the run with one line if it asks for Weights & Biases and the package is not there."""
    if metrics.wandb and find_spec("wandb") is None:
        raise UserError(
            "metrics.wandb is true but the package wandb is not installed: pip install wandb, or set it to false"
        )


def wandb_run(run_dir: Path, metrics: Metrics, *, recipe_text: str) -> Any:
    """The `wandb.Run` of a run's folder.

    Offline unless the environment says otherwise: WANDB_MODE is obeyed, and WANDB_API_KEY alone means online. A run
    that is continued goes on under the id kept in `wandb_run_id.txt`.
    """
    import wandb

    id_file = run_dir / "wandb_run_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid4().hex[:8])
    return wandb.init(
        project=metrics.wandb_project,
        entity=metrics.wandb_entity,
        name=metrics.wandb_run_name or run_dir.resolve().name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=run_dir,
        mode=os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),
        config={"recipe": recipe_text},
    )
