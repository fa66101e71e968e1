"""Processes, meshes and precision: how a single-device model runs on many devices."""

from torch.distributed import barrier

from grpo.parallel.apply import (
    blocks_of,
    clip_grad_norm,
    gathered,
    gradient_sync,
    parallelize,
    reshard,
    reshards_after_forward,
    shards_blocks,
)
from grpo.parallel.device_memory import GIB, free_memory, read_peak_memory
from grpo.parallel.distributed import (
    World,
    all_reduce_max,
    all_reduce_sums,
    broadcast_object,
    distributed,
    gather_numbers,
    gather_objects,
    launched_world,
    next_row,
    sum_over_ranks,
)
from grpo.parallel.launcher import run_main
from grpo.parallel.low_bit import adamw_8bit, has_low_bit_state, moment_bytes
from grpo.parallel.mesh import build_mesh, mesh_shape
from grpo.parallel.metric_sums import MetricSums
from grpo.parallel.precision import (
    compute_dtype,
    grad_scaler,
    mixed_precision_policy,
    require_backend,
    set_matmul_precision,
)
from grpo.parallel.weights import full_state_dict, load_full_state_dict
