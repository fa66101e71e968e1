"""Run by torchrun: the debug recipe in every mode of parallelism, and what FSDP2 allocates for a model.

Arguments: the folder of the outcomes. One start of the processes serves all modes, because starting takes longer than
they do. Each mode leaves a run's folder, and each rank what it has allocated in `allocated.<rank>.json`.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from grpo.config import GRPORecipe, load_recipe
from grpo.jobs.train_grpo import train
from grpo.models import GPT, GPTConfig
from grpo.parallel import World, barrier, distributed
from tests.parallel.toy import make_parallel

STEPS = 2
IMAGES, GROUP, PARTS = 8, 2, 2  # of all ranks in a step, completions of each, micro-batches of an optimizer step

ONE_TWO_FOUR, ONE_TWO, TWO_FOUR, TWO = (1, 2, 4), (1, 2), (2, 4), (2,)
HSDP = "--parallel.data_parallel hsdp"
TEXT = "--model.caption_dim 32 --model.cls_token_num 12 --text.encoder words"
SAMPLED = (
    "--rollout.mode autoregressive --rollout.cfg_scale 2 --reward.reconstruction.weight 0 --reward.jpeg_size.weight 1"
)
MODES = {
    "fsdp": (ONE_TWO_FOUR, ""),
    "fsdp, never resharded": (TWO, "--parallel.reshard_after_forward never"),
    "fsdp, every micro-batch reduced": (TWO, "--parallel.defer_gradient_sync false"),
    "sdp": (TWO_FOUR, "--parallel.data_parallel sdp"),
    "hsdp, replicated": (TWO, f"{HSDP} --parallel.shard_size 1"),
    "hsdp, replicas filled in": (TWO_FOUR, f"{HSDP} --parallel.shard_size {{half}}"),
    "hsdp, shards filled in": (TWO, f"{HSDP} --parallel.replicate_size {{half}}"),
    "hsdp, every micro-batch reduced": (
        TWO_FOUR,
        f"{HSDP} --parallel.shard_size {{half}} --parallel.defer_gradient_sync false",
    ),
    "selective recomputation": (TWO, "--activation_checkpoint.mode selective"),
    "full recomputation": (ONE_TWO, "--activation_checkpoint.mode full"),
    "compiled blocks": (TWO, "--compile.enabled true"),
    "tf32": (TWO, "--training.mixed_precision tf32"),
    "bf16": (ONE_TWO, "--training.mixed_precision bf16"),
    "bf16, reduced in bf16": (TWO, "--training.mixed_precision bf16 --training.grad_precision bf16"),
    "fp16, hsdp": (ONE_TWO_FOUR, f"--training.mixed_precision fp16 {HSDP} --parallel.shard_size {{half}}"),
    "text": (ONE_TWO_FOUR, TEXT),
    "sampled texts": (ONE_TWO, f"{TEXT} {SAMPLED}"),
    "text, recomputation, compiled blocks": (
        TWO,
        f"{TEXT} --activation_checkpoint.mode selective --compile.enabled true",
    ),
}
"""Mode -> numbers of processes that run it, flags; `half` is half of the processes."""

MEASURED = GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=51, block_size=16, num_classes=9)  # odd sizes: padding
MEASURED_MESHES = {"fsdp": ("fsdp", -1), "hsdp": ("hsdp", 1)}


def folder_of(output: Path, mode: str) -> Path:
    return output / mode.replace(", ", "-").replace(" ", "_")


def modes_for(processes: int) -> list[str]:
    """The modes that are run on this number of processes."""
    return [mode for mode, (sizes, _) in MODES.items() if processes in sizes]


def run(world: World, output: Path, mode: str) -> None:
    flags = MODES[mode][1].format(half=max(1, world.size // 2)).split()
    recipe = load_recipe(
        GRPORecipe,
        [
            "--config", "train_configs/debug.toml", "--metrics.run_dir", str(folder_of(output, mode)),
            "--data.image_size", "16", "--training.steps", str(STEPS),
            "--rollout.batch_size", str(IMAGES), "--rollout.num_generations", str(GROUP),
            "--training.micro_batch_size", str(IMAGES // world.size // PARTS),
            "--objective.kl", "k3", "--objective.kl_coef", "0.1", "--metrics.image_interval", "0",
            "--checkpoint.interval", "0", "--checkpoint.save_final", "false", *flags,
        ],
    )  # fmt: skip
    train(recipe, world)
    barrier()


def allocated(world: World) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients and moments that this rank holds after a step, by mesh."""
    sizes = {}
    for name, (mode, shard_size) in MEASURED_MESHES.items():
        model = make_parallel(world, GPT(MEASURED), data_parallel=mode, shard_size=shard_size)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).sum().backward()
        gradients = storage_bytes([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        sizes[name] = {
            "parameters": storage_bytes(list(model.parameters())),
            "gradients": gradients,
            "optimizer": storage_bytes(moments),
        }
    return sizes


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes behind tensors, of a sharded one behind this rank's shard; shared storage counts once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({local.untyped_storage().data_ptr(): local.untyped_storage().nbytes() for local in local}.values())


def main(output: Path) -> None:
    torch.set_num_threads(1)
    # Tracing is what the order of compilation and sharding can break; the C++ compiler behind it takes half a minute.
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    with distributed(120) as world:
        for mode in modes_for(world.size):
            run(world, output, mode)
        (output / f"allocated.{world.rank}.json").write_text(json.dumps(allocated(world)))
        barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
