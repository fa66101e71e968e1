"""A profiler's record of one step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from grpo.parallel import World


@contextmanager
def traced(run_dir: Path, step: int, *, world: World, wanted: int, tell: Callable[[str], None]) -> Iterator[None]:
    """Record the block if `step` is the one `wanted`: the trace and a table of its times, two files for every rank."""
    if step != wanted:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    path = run_dir / f"trace-step-{step:06d}-rank-{world.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # the main rank has made it on its own host only
    profiler.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    path.with_suffix(".txt").write_text(table)
    tell(f"trace of step {step}: {path}")
