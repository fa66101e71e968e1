"""How much memory a device has left, and how much a process has needed."""

import resource
import sys

import torch

GIB = 2**30


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process could still allocate: what the driver has, and what torch keeps for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def read_peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of a GPU's tensors since the last read, on a CPU of the whole process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
