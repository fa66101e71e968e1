import re

import pytest
import torch

from grpo.config import Parallel, UserError
from grpo.parallel import World, build_mesh
from grpo.parallel import mesh as mesh_module

TWO_HOSTS = World(rank=0, size=8, local_rank=0, local_size=4, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def describe_mesh(monkeypatch):
    """A mesh needs as many processes as it has places; look at what is asked for instead."""
    monkeypatch.setattr(mesh_module, "init_device_mesh", lambda device, shape, mesh_dim_names: (shape, mesh_dim_names))


@pytest.mark.parametrize(
    ("data_parallel", "shard_size", "shape"),
    [
        ("fsdp", -1, (8,)),
        ("sdp", 8, (8,)),
        ("hsdp", -1, (2, 4)),
        ("hsdp", 2, (4, 2)),
        ("hsdp", 8, (1, 8)),
        ("hsdp", 1, (8, 1)),
    ],
)
def test_shape(data_parallel, shard_size, shape):
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    assert build_mesh(Parallel(data_parallel=data_parallel, shard_size=shard_size), TWO_HOSTS) == (shape, names)


@pytest.mark.parametrize(
    ("shard_size", "replicate_size", "shape"),
    [(-1, 4, (4, 2)), (4, 2, (2, 4)), (-1, 8, (8, 1)), (2, -1, (4, 2)), (-1, 1, (1, 8))],
)
def test_one_size_fills_in_the_other(shard_size, replicate_size, shape):
    parallel = Parallel(data_parallel="hsdp", shard_size=shard_size, replicate_size=replicate_size)
    assert build_mesh(parallel, TWO_HOSTS)[0] == shape


@pytest.mark.parametrize(
    ("data_parallel", "shard_size", "replicate_size", "key"),
    [
        ("hsdp", -1, 3, "replicate_size = 3"),
        ("hsdp", 4, 4, "replicate_size = 4 x shard_size = 4"),
        ("hsdp", 0, 2, "replicate_size = 2 x shard_size = 0"),
        ("fsdp", -1, 2, "replicate_size = 2"),
    ],
)
def test_sizes_that_do_not_fit_together(data_parallel, shard_size, replicate_size, key):
    parallel = Parallel(data_parallel=data_parallel, shard_size=shard_size, replicate_size=replicate_size)
    with pytest.raises(UserError, match=re.escape(f"parallel.{key}")):
        build_mesh(parallel, TWO_HOSTS)


@pytest.mark.parametrize(("data_parallel", "shard_size"), [("hsdp", 3), ("hsdp", 16), ("hsdp", 0), ("fsdp", 4)])
def test_impossible_size(data_parallel, shard_size):
    with pytest.raises(UserError, match=r"parallel\.shard_size"):
        build_mesh(Parallel(data_parallel=data_parallel, shard_size=shard_size), TWO_HOSTS)
