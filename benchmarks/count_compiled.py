"""Kernels of a training step's compiled parts on a GPU, counted in Inductor's generated code without a GPU.

python benchmarks/count_compiled.py --preset GPT-XXL --json out.json

A block's forward and backward, as they are trained, and the tokenizer's decoder, as the rewards run it, are traced on
tensors without memory and lowered for an H100; nothing is compiled further. Every launch of the generated code counts:
kernels that Inductor wrote, and calls of a library or of this project's ops as one each. Memory copies are calls too.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_map

from grpo.kernels import Dropout
from grpo.models import MODEL_SPECS, VQModel, fold_upsampling, get_tokenizer_spec
from grpo.models.gpt import Block

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, warp_size=32, total_memory=80 << 30, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    gcnArchName="", L2_cache_size=50 << 20, uuid="0",
)  # fmt: skip


@torch.library.custom_op("count::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands in for the fused attention of a GPU, which tensors without a device do not choose."""
    return torch.empty_like(q)


attention.register_fake(lambda q, k, v: torch.empty_like(q))


@torch.library.custom_op("count::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v)]


attention_backward.register_fake(lambda grad, q, k, v: [torch.empty_like(x) for x in (q, k, v)])
attention.register_autograd(
    lambda ctx, grad: tuple(torch.ops.count.attention_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def as_on_gpu(graph: GraphModule, inputs: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The graph as if it had been traced on a GPU: its devices, and the tensors that its nodes are known to give."""
    gpu, meta = torch.device("cuda", 0), torch.device("meta")
    for node in graph.graph.nodes:
        node.args, node.kwargs = (
            tree_map(lambda value: gpu if value == meta else value, given) for given in (node.args, node.kwargs)
        )
    graph.recompile()

    class Record(Interpreter):
        def run_node(self, node):
            node.meta["val"] = result = super().run_node(node)
            return result

    mode = detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu) for x in inputs]
        Record(graph).run(*moved)
    return graph, moved


class Codes:
    """The generated code of what has been lowered."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def lower(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Callable:
        """A compiler for `aot_function`: notes the code, and returns what runs as before."""
        boxed = make_boxed_func(graph.forward)
        copy, moved = as_on_gpu(GraphModule(graph, graph.graph.__deepcopy__({})), inputs)
        mode = moved[0].fake_mode
        pretending = mock.patch.multiple(torch.cuda, create=True, **pretended())
        triton = mock.patch("torch._inductor.scheduler.has_triton", return_value=True)
        backend = mock.patch("torch.utils._triton.triton_hash_with_backend", return_value="")
        with pretending, triton, backend, V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            _recursive_post_grad_passes(copy)
            lowering = GraphLowering(copy, example_inputs=moved, shape_env=None)
            with V.set_graph_handler(lowering), mode:
                lowering.run(*moved)
                code = lowering.codegen()[0]
        self.texts.append(getattr(code, "value", code))
        return boxed


def pretended() -> dict:
    """What Inductor asks of torch.cuda while it writes code."""
    return {
        "is_available": lambda: True,
        "get_device_properties": lambda device=None: H100,
        "_get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: H100.name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "_lazy_init": lambda: None,
    }


def lowered(module: nn.Module, run: Callable, inputs: Sequence[Tensor], *, trains: bool) -> list[Counter]:
    """Launches of the module's forward and, where it trains, backward, by the names in the generated code."""
    codes, tensors = Codes(), {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def call(*arguments):
        given = dict(zip(tensors, arguments, strict=False))
        with torch.nn.utils.stateless._reparametrize_module(module, given):
            return run(*arguments[len(tensors) :])

    how = {"fw_compiler": codes.lower, "bw_compiler": codes.lower, "inference_compiler": codes.lower}
    compiled = aot_function(
        call, **how, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()
    )
    patched = mock.patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v))
    with patched, inductor.patch(compile_threads=1, layout_optimization=True), torch.set_grad_enabled(trains):
        result = compiled(*tensors.values(), *inputs)
        if trains:
            result.sum().backward()
    return [launches(text) for text in codes.texts]


def launches(code: str) -> Counter:
    """By name, of the function `call` in generated code."""
    body = code[code.index("def call") :]
    kernels = re.findall(r"(triton_\w+?)(?:_\d+)?\.run\(", body)
    calls = re.findall(r"(?:extern_kernels|torch\.ops\.\w+)\.(\w+)(?:\.default)?\(", body)
    return Counter(kernels + calls)


def block_launches(spec: str, *, image_size: int, images: int, dropout: float) -> list[Counter]:
    """Forward and backward of one block in bf16."""
    sizes = MODEL_SPECS[spec].config(image_size=image_size, dropout=dropout)
    with torch.device("meta"):
        block = Block(sizes).bfloat16()
        x = torch.empty(images, sizes.block_size, sizes.dim, dtype=torch.bfloat16, requires_grad=True)
        ids, layer = torch.empty(images, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    for module in block.modules():
        if hasattr(module, "table"):
            module.table = module.table.to("meta")

    def run(x: Tensor, ids: Tensor, layer: Tensor) -> Tensor:
        return block(x, dropout=Dropout(ids, layer=layer) if dropout else None)

    return lowered(block, run, (x, ids, layer), trains=True)


def decoder_launches(spec: str, *, codes: int, images: int) -> list[Counter]:
    """The decoder of the rewards in bf16, channels last."""
    with torch.device("meta"):
        tokenizer = VQModel(get_tokenizer_spec(spec).config()).requires_grad_(False)
        tokenizer = tokenizer.to(torch.bfloat16, memory_format=torch.channels_last)
        fold_upsampling(tokenizer.decoder)
        side = round(codes**0.5)
        z = torch.empty(images, tokenizer.config.z_channels, side, side, dtype=torch.bfloat16)
    return lowered(tokenizer.decoder, tokenizer.decoder, (z,), trains=False)


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--preset", choices=MODEL_SPECS, default="GPT-XXL")
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--parts", nargs="+", choices=("block", "decoder"), default=("block", "decoder"))
    options = parser.parse_args()
    results = {}
    if "block" in options.parts:
        parts = block_launches(options.preset, image_size=options.image_size, images=options.images, dropout=0.1)
        results |= dict(zip(("block forward", "block backward"), parts, strict=True))
    if "decoder" in options.parts:
        (results["decoder"],) = decoder_launches("VQ-16", codes=(options.image_size // 16) ** 2, images=64)
    for name, counter in results.items():
        print(f"{name}: {counter.total()}\n  " + ", ".join(f"{key} {number}" for key, number in counter.most_common()))
    if options.json:
        options.json.write_text(json.dumps({name: dict(counter) for name, counter in results.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
