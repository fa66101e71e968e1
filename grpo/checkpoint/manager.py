"""Save and resume a training run."""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from grpo.checkpoint import folders
from grpo.checkpoint.object_store import open_storage
from grpo.checkpoint.state import ExtraState, load_tensors, training_tensors
from grpo.checkpoint.storage import LocalFolder, Storage
from grpo.checkpoint.writing import About, CheckpointWriter
from grpo.config import Checkpoint, TransientError, UserError, is_url
from grpo.formats import CHECKPOINT_FORMAT, FileSum, ShardReader, saved_config
from grpo.parallel import World, broadcast_object, gather_objects


class CheckpointManager:
    """The checkpoints of one run: `<folder>/step-000100/` and so on. Every rank makes the same calls together.

    A checkpoint is written into a hidden folder, synced to disk, and renamed once every rank has finished, so that a
    folder with a checkpoint's name is a whole one. `manifest.json` in it has the size and checksum of every file.
    Background writing has its own process group, so that training may go on with its collectives meanwhile; one
    checkpoint is written at a time.

    `folder` is a path, created with the first checkpoint, or an fsspec URL such as s3://bucket/run; then files pass
    through `stage`, a folder of its own on each host, and `manifest.json`, written last, makes a checkpoint whole.
    `timeout_seconds` is how long a rank waits for another one's part.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        world: World,
        config: Checkpoint,
        timeout_seconds: int,
        stage: str | Path = ".stage",
    ) -> None:
        self.world, self.config = world, config
        self._stage = Path(stage) / os.environ.get("GROUP_RANK", "0")  # hosts may share the folder that it is in
        self.storage = open_storage(folder, stage=self._stage)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        self._group = group
        self._writer = CheckpointWriter(self.storage, world=world, config=config, group=group)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._origins: dict[Path, str] = {}  # of what was brought to the stage

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
        tensors = training_tensors(model, optimizer, extra)
        self._writer.begin(step, tensors)
        about: dict[str, Any] = {"format": CHECKPOINT_FORMAT, "step": step, "world_size": self.world.size}
        about |= {"torch": torch.__version__, "score": score}
        config, adapter = getattr(model, "config", None), getattr(model, "adapter", None)
        about["config"] = None if config is None else saved_config(config)
        shared = About(step, json.dumps(about | {"run": run_state}, indent=1), config, adapter)
        if self.config.async_save:
            options = StagingOptions(False, False, False, False)  # not pinned, shared, in the background, or unblocking
            staged = cast(dict[str, Any], DefaultStager(options).stage(tensors))
            self._pending = self._executor.submit(self._writer.write, shared, staged)
        else:
            self._writer.write(shared, tensors)

    def wait(self) -> None:
        """Return when no checkpoint is being written. Raises a UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is being written and free the background writer."""
        self.wait()
        self._executor.shutdown()
        if self.storage.is_remote and self.world.local_rank == 0:
            shutil.rmtree(self._stage, ignore_errors=True)
        dist.destroy_process_group(self._group)

    def best(self) -> tuple[str, float] | None:
        """Place of the best checkpoint and what it is ranked by; None without `checkpoint.keep_best`, or scores."""
        if not self.config.keep_best:
            return None
        whole = [name for name in self.storage.listing() if self.storage.inventory(name)[0] is None]
        found = self.storage.ranked(whole, self.config)
        return next(((f"{self.storage}/{name}", score) for name, score in found.items()), None)

    def failed(self) -> bool:
        """Whether background writing has failed on this rank; `wait` then raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def check_writable(self) -> None:
        """Find out now, not at the first checkpoint, that rank 0 can write nothing: a UserError. Collective."""
        if (problem := self._on_main(self.storage.write_probe)) is not None:
            remedy = "make it writable, or choose another checkpoint.dir or metrics.run_dir"
            raise type(problem)(f"checkpoints cannot be written to {self.storage}: {problem}; {remedy}")

    def resume_point(
        self, tell: Callable[[str], None] = lambda line: None, *, after: int = -1, wait_seconds: float = 10.0
    ) -> Path | None:
        """The newest checkpoint of the folder that is whole and undamaged, of a step beyond `after`. Collective.

        Every file is read and compared with its checksum, each rank reading its share. A folder that fails is renamed
        to `step-000100.damaged`, so that the run can write that step anew; `tell` gets a line about it, on every rank.
        From object storage it is brought to every host, where it lies until it is loaded.

        Raises a UserError, and touches nothing, where ranks do not see the same: a folder is condemned by all or none.
        `wait_seconds` is how long network file systems may take until they do.
        """
        self.wait()
        for name in self._seen_by_all(wait_seconds):
            if folders.step_of(name) <= after:
                break
            if (problem := self._examine(self.storage, name)) is None:
                return self.storage.local / name
            tell(f"{problem}; {self._on_main(functools.partial(self.storage.set_aside, name))}")
        return None

    def named(self, place: str | Path) -> Path:
        """A checkpoint by its path or URL, for every rank to read. Collective.

        Raises a UserError: not one that is whole and undamaged.
        """
        folder, _, name = str(place).rstrip("/").rpartition("/")
        storage = open_storage(folder or "/", stage=self._stage) if is_url(str(place)) else LocalFolder(Path(folder))
        if (problem := self._examine(storage, name)) is not None:
            raise UserError(f"checkpoint.resume: {problem}")
        return storage.local / name

    def place_of(self, path: Path) -> str:
        """Where a checkpoint that `resume_point` or `named` has found is kept: the path itself, or its URL."""
        return self._origins.get(path, str(path))

    def _seen_by_all(self, wait_seconds: float) -> list[str]:
        """The checkpoints' names, newest first, which every rank has to find."""
        deadline = time.monotonic() + wait_seconds
        while True:
            listings = gather_objects(self.storage.listing(), group=self._group)
            blind = [rank for rank, names in enumerate(listings) if names != listings[0]]
            if not blind:
                return listings[0]
            if self._on_main(lambda: time.monotonic() >= deadline):
                found = f"{len(listings[0])} checkpoints, rank {blind[0]} {len(listings[blind[0]])} other ones"
                raise TransientError(
                    f"the ranks do not see the same folder {self.storage}: rank 0 finds {found}. Mount it on every "
                    "host; nothing was changed"
                )
            time.sleep(0.5)

    def damage(self, path: str | Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None if nothing is. Collective.

        Raises a UserError where some ranks find fault and others do not.
        """
        path = Path(path)
        return self._examine(LocalFolder(path.parent), path.name)

    def _examine(self, storage: Storage, name: str) -> str | None:
        """The same of a checkpoint in any storage, which is brought to every host."""
        if storage.is_remote:
            problem, sums = self._on_main(lambda: storage.inventory(name))
        else:
            problem, sums = self._agreed(storage, name)
        if problem is not None:
            return problem
        self._fetch(storage, name, sums)
        path, world = storage.local / name, self.world
        part, parts = (world.local_rank, world.local_size) if storage.is_remote else (world.rank, world.size)
        share = folders.faults(path, sums, part=part, parts=parts)
        suspects = {file: sums[file] for found in gather_objects(share, group=self._group) for file in found}
        opinions = gather_objects(folders.faults(path, suspects), group=self._group) if suspects else []
        for file in suspects:
            content = [rank for rank, found in enumerate(opinions) if file not in found]
            if content:
                rank, found = next((rank, found) for rank, found in enumerate(opinions) if file in found)
                raise TransientError(
                    f"{path / file} {found[file]} on rank {rank}, and is as it was written on rank {content[0]}: see "
                    "to it that all hosts see the same files; nothing was changed"
                )
        told = ", ".join(f"{file} {reason}" for file, reason in sorted((opinions or [{}])[0].items()))
        return f"{storage}/{name} is damaged: {told}" if told else None

    def _agreed(self, storage: Storage, name: str) -> tuple[str | None, dict[str, FileSum]]:
        """The inventory that every rank has taken."""
        opinions = gather_objects(storage.inventory(name), group=self._group)
        for rank, opinion in enumerate(opinions):
            if opinion != opinions[0]:
                told = next(problem for problem in (opinion[0], opinions[0][0], "another manifest") if problem)
                raise TransientError(f"rank {rank} and rank 0 do not see the same files ({told}); nothing was changed")
        return opinions[0]

    def _fetch(self, storage: Storage, name: str, sums: Mapping[str, FileSum]) -> None:
        """Bring a checkpoint to every host's stage."""
        if not storage.is_remote:
            return
        problem: UserError | None = None
        self._origins[storage.local / name] = f"{storage}/{name}"
        if self.world.local_rank == 0:
            try:
                storage.fetch(name, sums)
            except OSError as error:
                problem = TransientError(f"{storage}/{name} could not be brought to {storage.local}: {error.strerror}")
            except UserError as error:
                problem = error
        if problems := [problem for problem in gather_objects(problem, group=self._group) if problem is not None]:
            raise problems[0]

    def read_run_state(self, path: str | Path) -> dict[str, Any]:
        """The `run_state` of a checkpoint. Raises a UserError if this is no checkpoint folder, or a damaged one."""
        with self._told_by_origin(Path(path)):
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
        with self._told_by_origin(Path(path)):
            folders.read_run_file(path)
            load_tensors(training_tensors(model, optimizer, extra), ShardReader(path))
        gather_objects(None, group=self._group)
        if Path(path).parent == self._stage and self.world.local_rank == 0:
            shutil.rmtree(path)

    @contextmanager
    def _told_by_origin(self, path: Path) -> Iterator[None]:
        """A user knows the place that a checkpoint came from, not the stage where it lies for a moment."""
        try:
            yield
        except UserError as error:
            lines = [line.replace(str(path), self.place_of(path)) for line in error.problems]
            raise type(error)(lines) from error

    def _on_main(self, find: Callable[[], Any]) -> Any:
        return broadcast_object(find() if self.world.is_main else None)
