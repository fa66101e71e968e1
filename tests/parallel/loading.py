"""Run by torchrun: the peak of each rank's host memory while `build_generator` loads a model.

Arguments: weights ("none" for random ones), data_parallel, folder of the outcomes. Each rank writes `rank.<rank>.json`
with bytes: "model", the whole model's fp32 weights; "shard", what this rank keeps; "peak", by how much its resident
memory grew at most while the model was built.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from grpo.config import GRPORecipe, load_recipe
from grpo.models import generator_sizes, get_family
from grpo.parallel import barrier, build_mesh, distributed
from grpo.training import build_generator

FLAGS = [
    "--data.name", "synthetic", "--data.image_size", "256", "--model.name", "GPT-B",
    "--training.mixed_precision", "fp32",
]  # fmt: skip
SAMPLE_SECONDS = 0.002


class PeakMemory:
    """Growth of this process's resident memory during a block, sampled."""

    def __enter__(self):
        self.start = self.highest = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()

    @property
    def growth(self) -> int:
        return self.highest - self.start

    def _sample(self):
        while not self.done.is_set():
            self.highest = max(self.highest, resident())
            time.sleep(SAMPLE_SECONDS)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(weights: str, data_parallel: str, output: Path) -> None:
    recipe = load_recipe(GRPORecipe, [*FLAGS, "--model.checkpoint", weights, "--parallel.data_parallel", data_parallel])
    with distributed(120) as world:
        mesh = build_mesh(recipe.parallel, world)
        barrier()
        with PeakMemory() as memory:
            model = build_generator(recipe, checkpoint=recipe.model.checkpoint, mesh=mesh, world=world)
            barrier()
        with torch.device("meta"):
            sizes = generator_sizes(recipe.model, recipe.tokenizer, image_size=recipe.data.image_size)
            whole = get_family(recipe.model.name).build(sizes)
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        outcome = {
            "model": sum(parameter.numel() for parameter in whole.parameters()) * 4,
            "shard": sum(tensor.untyped_storage().nbytes() for tensor in local),
            "peak": memory.growth,
        }
        (output / f"rank.{world.rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
