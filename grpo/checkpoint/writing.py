"""Write a checkpoint, all ranks together: its parts first, then what makes it a whole one."""

import functools
import logging
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from grpo.checkpoint import folders
from grpo.checkpoint.space import consolidated_files, require_space
from grpo.checkpoint.storage import Storage
from grpo.config import Checkpoint, TransientError, UserError
from grpo.formats import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST_NAME,
    Adapter,
    FileSum,
    file_sums,
    manifest_text,
    rank_shards,
    read_tensors,
    save_adapter,
    save_weights,
    write_shards,
)
from grpo.parallel import World, gather_objects

logger = logging.getLogger(__name__)


class About(NamedTuple):
    """What belongs to no rank in particular: step, text of the run's state, config of the model, adapter."""

    step: int
    run_text: str
    config: Any
    adapter: Adapter | None


class CheckpointWriter:
    """Writes the checkpoints of one folder. Every rank makes the same calls; its collectives are those of `group`."""

    def __init__(self, storage: Storage, *, world: World, config: Checkpoint, group: dist.ProcessGroup) -> None:
        self.storage, self.world, self.config, self._group = storage, world, config, group

    def begin(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Look for the space that the checkpoint will take, before anything is written, and make its folder."""
        self._together(step, lambda: self._begin(step, tensors), here=self.world.is_main)

    def write(self, about: About, tensors: dict[str, Any]) -> None:
        """Write the checkpoint that has begun. Raises a UserError on every rank if one fails; then nothing is left."""
        step, stages = about.step, self.storage.is_remote and self.world.local_rank == 0
        if self.storage.is_remote:
            self._together(step, self.storage.prepare, here=stages)
        shares = self._together(step, lambda: self._write_share(step, tensors))
        self._together(step, functools.partial(self._publish, about, shares), here=self.world.is_main)
        if stages:
            shutil.rmtree(self.storage.partial(step), ignore_errors=True)

    def _begin(self, step: int, tensors: Mapping[str, Any]) -> None:
        self.storage.begin(step)
        try:
            require_space(self.storage, tensors, config=self.config, world=self.world)
        except TransientError:
            self.storage.discard(step)
            raise

    def _write_share(self, step: int, tensors: dict[str, Any]) -> dict[str, FileSum]:
        """Write this rank's files; their checksums."""
        partial = self.storage.partial(step)
        write_shards(partial, tensors, group=self._group)
        sums = file_sums(rank_shards(partial, self.world.rank))
        self.storage.upload(step, sums)
        return sums

    def _publish(self, about: About, shares: list[dict[str, FileSum]]) -> None:
        """Write what belongs to no rank in particular, and make the checkpoint visible."""
        step, adapter = about.step, about.adapter
        config, storage, partial = self.config, self.storage, self.storage.partial(step)
        whole = consolidated_files(config) if adapter is None else [ADAPTER_WEIGHTS, ADAPTER_CONFIG]
        if whole:
            storage.complete(step, [name for share in shares for name in share])
        weights = read_tensors(partial, prefix="model.") if whole else {}
        if adapter is not None:
            save_adapter(partial, adapter, weights)
        for name in whole:
            if adapter is None:
                save_weights(partial / name, weights, config=about.config)
            folders.sync(partial / name)
        texts = {
            folders.RUN_STATE_NAME: about.run_text,
            folders.STEP_NAME: f"{step}\n",
            folders.STATE_TYPE_NAME: "sharded\n" if config.sharded else "full\n",
        }
        for name, text in texts.items():
            folders.write_synced(partial / name, text)
        sums = file_sums([partial / name for name in (*whole, *texts)])
        storage.upload(step, sums)
        name = folders.step_name(step)
        found = storage.sizes(name if storage.is_remote else partial.name)
        for rank, share in enumerate(shares):
            if any(found.get(name) != known.size for name, known in share.items()):
                raise TransientError(f"rank {rank} has written elsewhere: mount {storage} on every host")
            sums |= share
        folders.write_synced(partial / MANIFEST_NAME, manifest_text(sums))
        storage.publish(step)
        try:
            storage.remove_old(config, newest=name)
        except (OSError, UserError) as error:  # the new one is whole; what cannot go stays
            logger.warning("old checkpoints in %s could not be removed: %s", storage, error)

    def _together(self, step: int, work: Callable[[], Any], *, here: bool = True) -> list[Any]:
        """All ranks' results of the work, done `here` or not. If one fails all raise why, and what was written goes."""
        problem, result = None, None
        try:
            result = work() if here else None
        except (dcp.api.CheckpointException, UserError, OSError, RuntimeError) as error:
            problem = _reason(error)
        outcomes = gather_objects((problem, result), group=self._group)
        for rank, (problem, _) in enumerate(outcomes):
            if problem is not None:
                if self.world.is_main or (self.storage.is_remote and self.world.local_rank == 0):
                    self.storage.discard(step)
                where = f"could not be written to {self.storage} (rank {rank})"
                raise TransientError(f"The checkpoint of step {step} {where}: {problem}.")
        return [result for _, result in outcomes]


def _reason(error: BaseException) -> str:
    """Why a write failed, in a few words, with what to do where that is known."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return f"{text}; free space there or choose another checkpoint.dir"
