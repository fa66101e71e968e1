"""Memory: what a device has and has needed, and what a sharded model will need.

`python -m grpo.parallel.memory --config FILE` prints the estimate for a recipe.
"""

from grpo.parallel.memory.device import GIB, free_memory, read_peak_memory
from grpo.parallel.memory.sharded import ShardedBytes, count_parameters, sharded_bytes

__all__ = ["GIB", "ShardedBytes", "count_parameters", "free_memory", "read_peak_memory", "sharded_bytes"]
