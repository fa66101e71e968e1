"""A run's weights in files of their own, under names that do not change with the number of steps, for the next job."""

from pathlib import Path

from torch import nn

from grpo.config import ADAPTER_NAMES, AVERAGE_NAME, EXPORT_NAME
from grpo.formats import merged, require_finite, save_adapter
from grpo.models import adapter_matrices, save_weights
from grpo.parallel import World, full_state_dict
from grpo.training.moving_average import MovingAverage


def export(run_dir: Path, model: nn.Module, average: MovingAverage | None, world: World) -> None:
    """Write the weights, and their moving average where there is one. Every rank must call it.

    Raises:
        UserError: a weight is not finite, or the disk is full.
    """
    _write(run_dir, EXPORT_NAME, model, world)
    if average is not None:
        with average.swapped():
            _write(run_dir, AVERAGE_NAME, model, world)


def _write(run_dir: Path, name: str, model: nn.Module, world: World) -> None:
    """One file; of a model with an adapter that alone too, in a folder, and the weights merged with it."""
    weights, adapter = full_state_dict(model), getattr(model, "adapter", None)
    if not world.is_main:
        return
    require_finite(f"{run_dir / name} is not written", weights)
    if adapter is not None:
        matrices = adapter_matrices(weights)
        save_adapter(run_dir / ADAPTER_NAMES[name], adapter, matrices)
        weights = merged({key: weight for key, weight in weights.items() if key not in matrices}, adapter, matrices)
    save_weights(run_dir / name, weights, config=model.config)
