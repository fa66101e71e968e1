"""The device mesh that a model is spread over."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from grpo.config import UserError
from grpo.config.sections import Parallel
from grpo.parallel.distributed import World


def build_mesh(parallel: Parallel, world: World) -> DeviceMesh:
    """The ranks, laid out by `mesh_shape`: dimension `shard`, in hsdp `replicate` x `shard`. Raises as that does."""
    shape = mesh_shape(parallel, size=world.size, local_size=world.local_size)
    names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def mesh_shape(parallel: Parallel, *, size: int, local_size: int) -> tuple[int, ...]:
    """Sizes of the recipe's mesh: (shard,), which is all ranks, or in hsdp (replicate, shard).

    In hsdp neighbouring ranks shard together. A size of -1 is filled in from the other one; if both are -1, the ranks
    of one host, which have the fastest links, shard together. The run has `size` processes, one host `local_size`.

    Raises a UserError for sizes that do not fit the number of ranks, or that the mode would ignore.
    """
    shard, replicate = parallel.shard_size, parallel.replicate_size
    if parallel.data_parallel != "hsdp":
        mode = f'parallel.data_parallel = "{parallel.data_parallel}": remove it, or set data_parallel = "hsdp".'
        for name, value, implied in (("shard_size", shard, size), ("replicate_size", replicate, 1)):
            if value not in (-1, implied):
                raise UserError(f"parallel.{name} = {value} has no effect with {mode}")
        return (size,)
    if shard == -1:
        shard = local_size if replicate == -1 else _other_size("replicate_size", replicate, size)
    if replicate == -1:
        replicate = _other_size("shard_size", shard, size)
    if (product := replicate * shard) != size:
        sizes = f"parallel.replicate_size = {replicate} x shard_size = {shard} are {product} processes"
        raise UserError(f"{sizes}, but the run has {size}: set one of the two to -1.")
    return replicate, shard


def _other_size(name: str, value: int, size: int) -> int:
    if value < 1 or size % value:
        divisors = ", ".join(str(divisor) for divisor in range(1, size + 1) if size % divisor == 0)
        advice = f"take -1 or one of {divisors}"
        raise UserError(f"parallel.{name} = {value} does not divide the {size} processes of this run: {advice}.")
    return size // value
