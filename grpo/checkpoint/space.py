"""How much room a checkpoint takes, and whether it is there."""

import shutil
from collections.abc import Mapping

from torch import Tensor

from grpo.checkpoint.storage import Storage
from grpo.config import Checkpoint, TransientError
from grpo.formats import CONSOLIDATED
from grpo.parallel import World


def consolidated_files(config: Checkpoint) -> list[str]:
    """The files with all weights in one that the recipe wants in a checkpoint."""
    wanted = {CONSOLIDATED: not config.sharded, "consolidated.safetensors": config.safetensors}
    return [name for name, is_wanted in wanted.items() if is_wanted]


def require_space(storage: Storage, tensors: Mapping[str, Tensor], *, config: Checkpoint, world: World) -> None:
    """Raise a TransientError if the file system that rank 0 writes to has less room than a checkpoint takes.

    `tensors` are all that goes into it, sharded or not; those under `model.` also go into files of all weights.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    files = consolidated_files(config)
    needed = sum(sizes.values()) + len(files) * sum(sizes[name] for name in sizes if name.startswith("model."))
    if storage.is_remote and not files:
        needed = needed * world.local_size // world.size  # the shards of this host only
    place = storage.local
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < needed:
        has = f"{free / 2**30:.2f} GiB are free in {place} and it takes about {needed / 2**30:.2f} GiB"
        raise TransientError(f"{has}; free space there or choose another checkpoint.dir")
