"""Kernels that one sampling step launches on a GPU, counted without one.

python benchmarks/count_kernels.py --preset GPT-XXL --json out.json

The step runs on CUDA tensors without memory (fake tensors), and every operation that computes counts as one launch:
what only views or allocates launches nothing, and an op of this project is one kernel. A library may cut a product of
few rows in two launches; `bench_rollout.py` counts on a GPU what its profiler saw.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.kernels import Draw
from grpo.models import MODEL_SPECS, CachedForward, ClassCondition, family_of, get_family
from grpo.rollout.cached_sampler import CachedSampler

ALLOCATES = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "device",
}

GPU = {"dtype": torch.bfloat16, "device": "cuda"}
SIDES = ("fused", "library", "shared", "plain")


class LaunchCounter(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation._schema.name.partition("::")[2]
        if not operation.is_view and name not in ALLOCATES:
            self.launches[name] += 1
        return operation(*arguments, **(options or {}))


def count(spec: str, *, image_size: int, images: int, cfg_scale: float, side: str) -> dict:
    """Launches of a step of bf16 sampling: in all, of one block, and by operation.

    `side` is fused, library (fused but for the products, as with more rows; with a copy of the weights), shared (the
    same with the model's own weights) or plain.
    """
    sizes = MODEL_SPECS[spec].config(image_size=image_size)
    with torch.device("meta"):
        model = get_family(spec).build(sizes)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(weight.shape, **GPU), requires_grad=False))
            for name, table in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(table.shape, device="cuda"))
        if side == "plain":
            forward = CachedForward(model)
        else:
            forward = family_of(model).cached_forward(model, impl="triton", copies=side != "shared")
            forward.few_rows = forward.few_rows if side == "fused" else 0
        engine = CachedSampler(forward, images, draw=Draw(), cfg_scale=cfg_scale, cfg_interval=-1)
        engine.start(ClassCondition(torch.zeros(images, dtype=torch.int64, device="cuda")), engine.row_ids)
        with LaunchCounter() as counter:
            engine.step()
        with LaunchCounter() as outside:
            forward.blocks, model.layers = [], torch.nn.ModuleList()
            engine.cache = engine.cache._replace(keys=engine.cache.keys[:0], values=engine.cache.values[:0])
            engine.step()
    step, rest = counter.launches.total(), outside.launches.total()
    return {"step": step, "block": (step - rest) / sizes.n_layer, "operations": dict(counter.launches.most_common())}


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=MODEL_SPECS, default="GPT-XXL")
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    options = parser.parse_args()
    work = {"image_size": options.image_size, "images": options.images, "cfg_scale": options.cfg_scale}
    results = {side: count(options.preset, **work, side=side) for side in options.sides}
    for side, result in results.items():
        print(f"{options.preset} {side}: {result['step']} a step, {result['block']:g} a block")
        print("  " + ", ".join(f"{name} {number}" for name, number in result["operations"].items()))
    if options.json:
        options.json.write_text(json.dumps({"spec": options.preset, **work, "sides": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
