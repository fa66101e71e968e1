"""Save and resume a training run."""

import json
import pickle
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from grpo.checkpoint import folders
from grpo.checkpoint.state import load_training_tensors, training_tensors
from grpo.config import UserError
from grpo.parallel import World, broadcast_object
from grpo.parallel.safe_checkpoint import SafeFileSystemReader, read_tensors


@dataclass(frozen=True)
class _Snapshot:
    """All that one rank has to write."""

    step: int
    tensors: dict[str, Any]
    run_state: str
    rank_state: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run: `<folder>/step-000100/` and so on. Every rank makes the same calls together.

    A checkpoint is written into a hidden folder, synced to disk, and renamed once every rank has finished, so that a
    folder with a checkpoint's name is a whole one. Background writing has its own process group, so that training may
    go on with its collectives meanwhile; one checkpoint is written at a time.

    Args:
        folder: created with the first checkpoint.
        sharded: write shards only; otherwise `consolidated.pth` too, {"model": weights} as LlamaGen loads them.
        keep_last: newest checkpoints to keep; 0 keeps all.
        async_save: copy the state and write it in the background.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        world: World,
        sharded: bool,
        keep_last: int,
        async_save: bool,
    ) -> None:
        self.folder, self.world = Path(folder), world
        self.sharded, self.keep_last, self.async_save = sharded, keep_last, async_save
        self._group = dist.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run_state: Mapping[str, Any],
        rank_state: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint of a step.

        Args:
            run_state: what is the same on every rank: counters, data position, schedule; JSON types only.
            rank_state: what each rank has of its own, e.g. RNG states: tensors, numbers, strings and their containers.

        Raises:
            UserError: there is one of this step already, or it (or, in the background, the one before) could not be
                written.
        """
        self.wait()
        self._raise_together(self._start(step), step)
        snapshot = _Snapshot(
            step=step,
            tensors=training_tensors(model, optimizer),
            run_state=json.dumps(
                {
                    "step": step,
                    "world_size": self.world.size,
                    "torch": torch.__version__,
                    "run": run_state,
                },
                indent=1,
            ),
            rank_state=dict(rank_state),
        )
        if not self.async_save:
            self._write(snapshot)
            return
        copy = replace(snapshot, tensors=_copy_to_cpu(snapshot.tensors), rank_state=_copy_to_cpu(snapshot.rank_state))
        self._pending = self._executor.submit(self._write, copy)

    def wait(self) -> None:
        """Return when no checkpoint is being written.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is being written and free the background writer."""
        self.wait()
        self._executor.shutdown()
        dist.destroy_process_group(self._group)

    def latest(self) -> Path | None:
        """The newest complete checkpoint in the folder, as rank 0 sees it."""
        self.wait()
        return broadcast_object(folders.newest_complete(self.folder) if self.world.is_main else None)

    def read_run_state(self, path: str | Path) -> dict[str, Any]:
        """The `run_state` of a checkpoint.

        Raises:
            UserError: not a checkpoint folder, or damaged.
        """
        return _read_run_file(path)["run"]

    def load(self, path: str | Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Overwrite weights and optimizer state by a checkpoint's, whatever the number of ranks that wrote it.

        Returns:
            This rank's `rank_state`; None when the number of ranks has changed, so that nobody's state fits.

        Raises:
            UserError: incomplete, damaged, not to be trusted, or of another model.
        """
        world_size = _read_run_file(path)["world_size"]
        load_training_tensors(model, optimizer, SafeFileSystemReader(path))
        return _read_rank_file(path, self.world.rank) if world_size == self.world.size else None

    def _start(self, step: int) -> str | None:
        """Make room for a checkpoint on rank 0; the reason why not."""
        if not self.world.is_main:
            return None
        final = folders.step_folder(self.folder, step)
        if final.exists():
            return f"{final} exists and is not overwritten: resume from it, remove it, or choose another checkpoint.dir"
        try:
            folders.start_partial(self.folder, step)
        except OSError as error:
            return _reason(error)
        return None

    def _write(self, snapshot: _Snapshot) -> None:
        partial = folders.partial_folder(self.folder, snapshot.step)
        self._raise_together(self._write_files(partial, snapshot), snapshot.step)
        self._raise_together(self._publish(partial, snapshot.step), snapshot.step)

    def _write_files(self, partial: Path, snapshot: _Snapshot) -> str | None:
        """Write this rank's part; the reason why not."""
        try:
            dcp.save(snapshot.tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=self._group)
            rank_file = partial / _rank_file_name(self.world.rank)
            torch.save(snapshot.rank_state, rank_file)
            folders.sync(rank_file)
            if self.world.is_main:
                self._write_main_files(partial, snapshot)
        except (dcp.api.CheckpointException, UserError, OSError, RuntimeError) as error:
            return _reason(error)
        return None

    def _write_main_files(self, partial: Path, snapshot: _Snapshot) -> None:
        if not self.sharded:
            weights = partial / folders.CONSOLIDATED_NAME
            torch.save({"model": read_tensors(partial, prefix="model.")}, weights)
            folders.sync(weights)
        folders.write_synced(partial / folders.RUN_STATE_NAME, snapshot.run_state)
        folders.write_synced(partial / folders.STEP_NAME, f"{snapshot.step}\n")
        folders.write_synced(partial / folders.STATE_TYPE_NAME, "sharded\n" if self.sharded else "full\n")

    def _publish(self, partial: Path, step: int) -> str | None:
        if not self.world.is_main:
            return None
        final = folders.step_folder(self.folder, step)
        try:
            folders.publish(partial, final)
            folders.remove_old(self.folder, keep=self.keep_last, newest=final)
        except OSError as error:
            return _reason(error)
        return None

    def _raise_together(self, problem: str | None, step: int) -> None:
        """Wait for all ranks; if any of them has a problem, all raise the first one, and what was written goes."""
        problems: list[str | None] = [None] * self.world.size
        dist.all_gather_object(problems, problem, group=self._group)
        first = next(((rank, text) for rank, text in enumerate(problems) if text is not None), None)
        if first is None:
            return
        if self.world.is_main:
            shutil.rmtree(folders.partial_folder(self.folder, step), ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {step} could not be written to {self.folder} (rank {first[0]}): {first[1]}."
        )


def _copy_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    options = StagingOptions(False, False, False, False)  # not pinned, shared, staged in the background, or unblocking
    return DefaultStager(options).stage(state)


def _rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.pth"


def _read_run_file(path: str | Path) -> dict[str, Any]:
    file = Path(path) / folders.RUN_STATE_NAME
    try:
        state = json.loads(file.read_text())
        if not {"run", "world_size"} <= state.keys():
            raise ValueError("keys are missing")
    except OSError as error:
        raise UserError(f"{path} is not a checkpoint of a run: {folders.RUN_STATE_NAME}: {error.strerror}.") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): take another checkpoint.") from None
    return state


def _read_rank_file(path: str | Path, rank: int) -> dict[str, Any]:
    file = Path(path) / _rank_file_name(rank)
    try:
        return torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): take another checkpoint.") from error


def _reason(error: BaseException) -> str:
    """Why a write failed, in a few words, with what to do where that is known."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return f"{text}; free space there or choose another checkpoint.dir"
