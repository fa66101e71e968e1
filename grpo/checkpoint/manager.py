"""Save and resume a training run."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from grpo.checkpoint import folders
from grpo.checkpoint.state import ExtraState, load_tensors, training_tensors
from grpo.config import Checkpoint, UserError
from grpo.formats import (
    MANIFEST_NAME,
    FileSum,
    ShardReader,
    file_sums,
    manifest_text,
    rank_shards,
    read_tensors,
    save_weights,
    saved_config,
    write_shards,
)
from grpo.parallel import World, broadcast_object


class CheckpointManager:
    """The checkpoints of one run: `<folder>/step-000100/` and so on. Every rank makes the same calls together.

    A checkpoint is written into a hidden folder, synced to disk, and renamed once every rank has finished, so that a
    folder with a checkpoint's name is a whole one. `manifest.json` in it has the size and checksum of every file.
    Background writing has its own process group, so that training may go on with its collectives meanwhile; one
    checkpoint is written at a time.

    `folder` is created with the first checkpoint; `timeout_seconds` is how long a rank waits for another one's part.
    """

    def __init__(self, folder: str | Path, *, world: World, config: Checkpoint, timeout_seconds: int) -> None:
        self.folder, self.world, self.config = Path(folder), world, config
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run_state: Mapping[str, Any],
        extra: Mapping[str, ExtraState] | None = None,
        score: float | None = None,
    ) -> None:
        """Write the checkpoint of a step.

        Args:
            run_state: what is the same on every rank: counters, data position, schedule; JSON types only.
            extra: more tensors by name, see `ExtraState`; their counters belong into `run_state`.
            score: what `checkpoint.keep_best` ranks it by.

        Raises a UserError: there is one of this step, or it (in the background, the one before) could not be written.
        """
        self.wait()
        self._together(step, lambda: self.world.is_main and folders.start_partial(self.folder, step))
        about = {"step": step, "world_size": self.world.size, "torch": torch.__version__, "score": score}
        config = getattr(model, "config", None)
        about["config"] = None if config is None else saved_config(config)
        shared = step, json.dumps(about | {"run": run_state}, indent=1), config
        tensors = training_tensors(model, optimizer, extra)
        if self.config.async_save:
            options = StagingOptions(False, False, False, False)  # not pinned, shared, in the background, or unblocking
            self._pending = self._executor.submit(self._write, *shared, DefaultStager(options).stage(tensors))
        else:
            self._write(*shared, tensors)

    def wait(self) -> None:
        """Return when no checkpoint is being written. Raises a UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is being written and free the background writer."""
        self.wait()
        self._executor.shutdown()
        dist.destroy_process_group(self._group)

    def failed(self) -> bool:
        """Whether background writing has failed on this rank; `wait` then raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def check_writable(self) -> None:
        """Find out now, not at the first checkpoint, that rank 0 can write nothing: a UserError. Collective."""
        if (problem := self._on_main(lambda: folders.write_probe(self.folder))) is not None:
            remedy = "make it writable, or choose another checkpoint.dir or metrics.run_dir"
            raise UserError(f"checkpoints cannot be written to {self.folder}: {problem}; {remedy}")

    def resume_point(
        self, tell: Callable[[str], None] = lambda line: None, *, after: int = -1, wait_seconds: float = 10.0
    ) -> Path | None:
        """The newest checkpoint of the folder that is whole and undamaged, of a step beyond `after`. Collective.

        Every file is read and compared with its checksum, each rank reading its share. A folder that fails is renamed
        to `step-000100.damaged`, so that the run can write that step anew; `tell` gets a line about it, on every rank.

        Raises a UserError, and touches nothing, where ranks do not see the same: a folder is condemned by all or none.
        `wait_seconds` is how long network file systems may take until they do.
        """
        self.wait()
        for path in self._seen_by_all(wait_seconds):
            if folders.step_of(path) <= after:
                break
            if (problem := self.damage(path)) is None:
                return path
            tell(f"{problem}; {self._on_main(lambda path=path: folders.set_aside(path))}")
        return None

    def _seen_by_all(self, wait_seconds: float) -> list[Path]:
        """The checkpoint folders, newest first, which every rank has to find."""
        deadline = time.monotonic() + wait_seconds
        while True:
            listings = self._gather([path.name for path in folders.by_step(self.folder)])
            blind = [rank for rank, names in enumerate(listings) if names != listings[0]]
            if not blind:
                return [self.folder / name for name in listings[0]]
            if self._on_main(lambda: time.monotonic() >= deadline):
                found = f"{len(listings[0])} checkpoints, rank {blind[0]} {len(listings[blind[0]])} other ones"
                raise UserError(
                    f"the ranks do not see the same folder {self.folder}: rank 0 finds {found}. Mount it on every "
                    "host; nothing was changed"
                )
            time.sleep(0.5)

    def damage(self, path: str | Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None if nothing is. Collective.

        Raises a UserError where some ranks find fault and others do not.
        """
        path = Path(path)
        problem, sums = self._on_main(lambda: folders.inventory(path))
        if problem is not None:
            return problem
        share = folders.faults(path, sums, part=self.world.rank, parts=self.world.size)
        suspects = {name: sums[name] for found in self._gather(share) for name in found}
        opinions = self._gather(folders.faults(path, suspects)) if suspects else []
        for name in suspects:
            content = [rank for rank, found in enumerate(opinions) if name not in found]
            if content:
                rank, found = next((rank, found) for rank, found in enumerate(opinions) if name in found)
                raise UserError(
                    f"{path / name} {found[name]} on rank {rank}, and is as it was written on rank {content[0]}: see "
                    "to it that all hosts see the same files; nothing was changed"
                )
        told = ", ".join(f"{name} {reason}" for name, reason in sorted((opinions or [{}])[0].items()))
        return f"{path} is damaged: {told}" if told else None

    def read_run_state(self, path: str | Path) -> dict[str, Any]:
        """The `run_state` of a checkpoint. Raises a UserError if this is no checkpoint folder, or a damaged one."""
        return folders.read_run_file(path)["run"]

    def load(
        self,
        path: str | Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, ExtraState] | None = None,
    ) -> None:
        """Overwrite weights, optimizer state and `extra` by a checkpoint's, whatever the number of ranks that wrote it.

        Raises a UserError: incomplete, damaged, not to be trusted, or of another model.
        """
        folders.read_run_file(path)
        load_tensors(training_tensors(model, optimizer, extra), ShardReader(path))

    def _write(self, step: int, run_text: str, sizes: Any, tensors: dict[str, Any]) -> None:
        """Write a checkpoint together; `sizes` are the model's config, for weights in one file."""
        partial = folders.partial_folder(self.folder, step)
        shares = self._together(step, lambda: self._write_share(partial, tensors))
        self._together(step, lambda: self.world.is_main and self._publish(partial, step, run_text, sizes, shares))

    def _write_share(self, partial: Path, tensors: dict[str, Any]) -> dict[str, FileSum]:
        """Write this rank's files; their checksums."""
        write_shards(partial, tensors, group=self._group)
        return file_sums(rank_shards(partial, self.world.rank))

    def _publish(self, partial: Path, step: int, run_text: str, sizes: Any, shares: list[dict[str, FileSum]]) -> None:
        """Write what belongs to no rank in particular, and make the checkpoint visible."""
        config = self.config
        wanted = {"consolidated.pth": not config.sharded, "consolidated.safetensors": config.safetensors}
        consolidated = [name for name, is_wanted in wanted.items() if is_wanted]
        weights = read_tensors(partial, prefix="model.") if consolidated else {}
        for name in consolidated:
            save_weights(partial / name, weights, config=sizes)
            folders.sync(partial / name)
        texts = {
            folders.RUN_STATE_NAME: run_text,
            folders.STEP_NAME: f"{step}\n",
            folders.STATE_TYPE_NAME: "sharded\n" if config.sharded else "full\n",
        }
        for name, text in texts.items():
            folders.write_synced(partial / name, text)
        sums = file_sums([partial / name for name in (*consolidated, *texts)])
        for rank, share in enumerate(shares):
            if any(not (partial / name).is_file() for name in share):
                raise UserError(f"rank {rank} has written elsewhere: mount {self.folder} on every host")
            sums |= share
        folders.write_synced(partial / MANIFEST_NAME, manifest_text(sums))
        final = folders.step_folder(self.folder, step)
        folders.publish(partial, final)
        folders.remove_old(self.folder, config, newest=final)

    def _together(self, step: int, work: Callable[[], Any]) -> list[Any]:
        """Do this rank's part; the results of all ranks. If one fails, all raise its reason, what was written goes."""
        problem, result = None, None
        try:
            result = work()
        except (dcp.api.CheckpointException, UserError, OSError, RuntimeError) as error:
            problem = _reason(error)
        outcomes = self._gather((problem, result))
        for rank, (problem, _) in enumerate(outcomes):
            if problem is not None:
                if self.world.is_main:
                    shutil.rmtree(folders.partial_folder(self.folder, step), ignore_errors=True)
                where = f"could not be written to {self.folder} (rank {rank})"
                raise UserError(f"The checkpoint of step {step} {where}: {problem}.")
        return [result for _, result in outcomes]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _on_main(self, find: Callable[[], Any]) -> Any:
        return broadcast_object(find() if self.world.is_main else None)


def _reason(error: BaseException) -> str:
    """Why a write failed, in a few words, with what to do where that is known."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return f"{text}; free space there or choose another checkpoint.dir"
