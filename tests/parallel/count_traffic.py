"""Run by torchrun: bytes of the collectives of one optimizer step, counted as they are called, for each case.

Arguments: the file of the outcome, which rank 0 writes.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config import ActivationCheckpoint, Compile, Parallel, Training
from grpo.formats import Adapter
from grpo.models import GPT, add_adapter
from grpo.parallel import build_mesh, clip_grad_norm, distributed, gradient_sync, parallelize
from tests.parallel.toy import loss_sum, make_batch, make_model

MICRO_BATCHES = 3
CASES = {
    "fsdp": {},
    "fsdp, sampling": {"samplings": 2},
    "fsdp, never": {"reshard_after_forward": "never", "samplings": 2},
    "fsdp, every micro-batch reduced": {"defer_gradient_sync": False},
    "fsdp, whole": {"shard_blocks": False},
    "sdp": {"data_parallel": "sdp"},
    "hsdp": {"data_parallel": "hsdp", "shard_size": 2},
    "fsdp, adapter": {"adapter": True, "samplings": 1},
    "hsdp, adapter": {"data_parallel": "hsdp", "shard_size": 2, "adapter": True},
}
KINDS = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced", "allreduce_": "averaged"}


class CountBytes(TorchDispatchMode):
    """Bytes of the larger tensors of collectives, by kind, and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys((*KINDS.values(), "collectives"), 0)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kind = KINDS.get(operation._schema.name.partition("::")[2])
        if operation.namespace == "c10d" and kind:
            tensors = args[0] if kind == "averaged" else args[:2]
            self.counts[kind] += max(tensor.nbytes for tensor in tensors)
            self.counts["collectives"] += 1
        return operation(*args, **(kwargs or {}))


def training() -> Training:
    return Training(mixed_precision="bf16", steps=1, batch_size=1, micro_batch_size=1)


def model_of(settings: dict) -> GPT:
    """The model of a case, of which the key `adapter` is taken."""
    adapted = settings.pop("adapter", False)
    return add_adapter(make_model(), Adapter(rank=3, alpha=3, targets=("wqkv", "w2"))) if adapted else make_model()


def count(world, settings: dict) -> dict[str, int]:
    """The second of two steps, since the first makes what FSDP2 keeps."""
    settings = dict(settings)
    samplings, plain = settings.pop("samplings", 0), model_of(settings)
    parallel = Parallel(**settings)
    how = {"parallel": parallel, "compile": Compile(), "activation_checkpoint": ActivationCheckpoint()}
    model = parallelize(plain, mesh=build_mesh(parallel, world), training=training(), **how)
    tokens, class_ids = make_batch(size=2)
    for _ in range(2):
        with CountBytes() as counter:
            for _ in range(samplings):
                with torch.no_grad():
                    model.hidden(tokens[:, :-1], class_ids)
            for part in range(MICRO_BATCHES):
                gradient_sync(model, part == MICRO_BATCHES - 1)
                loss_sum(model, tokens, class_ids).backward()
        clip_grad_norm(model, 1.0)
        model.zero_grad()
    return counter.counts


def main(output: Path) -> None:
    with distributed(120) as world:
        counted = {name: count(world, case) for name, case in CASES.items()}
        if world.is_main:
            output.write_text(json.dumps(counted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
