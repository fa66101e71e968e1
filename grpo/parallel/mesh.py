"""The device mesh that a model is spread over."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from grpo.config import UserError
from grpo.config.sections import Parallel
from grpo.parallel.distributed import World


def build_mesh(parallel: Parallel, world: World) -> DeviceMesh:
    """Lay the ranks out for data parallelism.

    Returns:
        fsdp and sdp: one dimension, `shard`, of all ranks. hsdp: `replicate` x `shard`, where neighbouring ranks
        shard together; -1 takes the ranks of one host, which have the fastest links.

    Raises:
        UserError: a shard size that does not divide the number of ranks, or that the mode would ignore.
    """
    shard_size = parallel.shard_size
    if parallel.data_parallel != "hsdp":
        if shard_size not in (-1, world.size):
            raise UserError(
                f"parallel.shard_size = {shard_size} has no effect with parallel.data_parallel = "
                f'"{parallel.data_parallel}": remove it, or set data_parallel = "hsdp".'
            )
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if shard_size == -1:
        shard_size = world.local_size
    if shard_size < 1 or world.size % shard_size:
        divisors = ", ".join(str(size) for size in range(1, world.size + 1) if world.size % size == 0)
        raise UserError(
            f"parallel.shard_size = {shard_size} does not divide the {world.size} processes of this run: "
            f"take -1 or one of {divisors}."
        )
    shape = (world.size // shard_size, shard_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
