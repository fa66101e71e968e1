"""Compiles the Triton kernels ahead of time for one target and prints what the compiler made of each, as JSON.

    python tests/kernels/compile_kernels.py cuda:90

Runs in a process of its own: a failing LLVM may abort it, and the interpreter must be off. Needs no GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo.kernels import (
    triton_cached_attention,
    triton_dropout,
    triton_few_rows,
    triton_linear_log_probs,
    triton_log_probs,
    triton_norm_and_gate,
    triton_ratio_loss,
    triton_sampling,
    triton_uniform,
)

V = 16384


def kernels():
    """Name, kernel, types of its run-time arguments in order, and compile-time options, at production shapes."""
    sample_types = "*fp32 *i64 *i64 *i64 *fp32 *fp32 *i64 *fp32 *fp32 *fp32 i64 fp32 i32 fp32"
    draws = (("sample", 8, 1.0, 0, 1.0), ("sample_truncated", 8, 0.9, 100, 0.9), ("sample_4096", 4096, 0.9, 100, 0.9))
    for name, *settings in draws:
        options = triton_sampling.kernel_options(V, *settings)
        yield name, triton_sampling.sample_kernel, sample_types, {"V": V, "HAS_NOISE": False, **options}

    options = triton_log_probs.kernel_options("log_probs_forward", V, 8, True)
    forward, backward = triton_log_probs.forward_kernel, triton_log_probs.backward_kernel
    yield "log_probs", forward, "*bf16 *i64 *fp32 *fp32 *fp32 i64 fp32", options
    options = triton_log_probs.kernel_options("log_probs_backward", V, 8, True)
    types = "*fp32 *fp32 *fp32 *i64 *fp32 *fp32 *bf16 i64 i64 fp32"  # the in-place step of the projection
    yield "log_probs_backward", backward, types, options

    types = "*bf16 *bf16 *fp32 *fp32 *fp32 i32 i64 i64 fp32"
    for D in (768, 3200):
        options = triton_linear_log_probs.split_options(V, D, True)
        yield f"linear_{D}", triton_linear_log_probs.split_kernel, types, options
    types = "*bf16 *bf16 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i64 i64 fp32"
    yield (
        "linear_merge",
        triton_linear_log_probs.merge_kernel,
        types,
        triton_linear_log_probs.merge_options(V, D, 8, True),
    )

    types = "*fp32 " * 7 + "*i32 *fp32 *fp32 " + "i32 " * 21 + "fp32 " * 5
    options = triton_ratio_loss.kernel_options(65536, "k3", True, "clip")
    yield "ratio_loss", triton_ratio_loss.ratio_loss_kernel, types, options

    types = "*bf16 *bf16 *i64 *i64 i64 i32 i64 i32 i32 fp32"
    yield "dropout", triton_dropout.dropout_kernel, types, triton_dropout.kernel_options(1536)
    types = "*i64 *fp32 i32 i32 i32 i64 i32"
    yield "uniform", triton_uniform.uniform_kernel, types, triton_uniform.kernel_options()

    attention, norm, gate = (
        triton_cached_attention.cached_attention_kernel,
        triton_norm_and_gate.norm_kernel,
        triton_norm_and_gate.gate_kernel,
    )
    types = "*bf16 *bf16 *bf16 *i64 *fp32 *fp32 *fp32 *i32 *bf16 " + "i64 " * 7 + "fp32"
    for heads in ((24, 24, 64), (32, 32, 100), (32, 8, 128)):
        options = triton_cached_attention.kernel_options(*heads, 576, heads[2] == 64)
        yield f"cached_attention_{heads[2]}", attention, types, options
    for D in (1536, 4096):
        yield (
            f"norm_{D}",
            norm,
            "*bf16 *bf16 *bf16 *bf16 *bf16 i64 i64 fp32",
            triton_norm_and_gate.norm_options(D, True),
        )
    for N in (16, 32):
        types = "*bf16 *fp32 *bf16 *bf16 *bf16 *bf16 i32 i32 i64 i64 i64 fp32"
        options = triton_few_rows.norm_linear_options(N, 1536, 4096, 96, True, 2)
        yield f"norm_linear_{N}", triton_few_rows.norm_linear_kernel, types, options
        types = "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *i32 i32 i32 i64 i64 i64"
        options = triton_few_rows.linear_add_options(N, 4096, 1536, 16, 2)
        yield f"linear_add_{N}", triton_few_rows.linear_add_kernel, types, options
    yield "gate", gate, "*bf16 *bf16 *bf16 i64 i64", triton_norm_and_gate.gate_options(4096)


def compile_kernel(kernel, types: str, options: dict, target: GPUTarget):
    """The compiled kernel. Pointers and 64-bit strides are taken as multiples of 16, as at production shapes."""
    if "EX2" in options:
        options = {**options, "EX2": target.backend == "cuda"}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    types = types.split()
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*" or kind == "i64"}
    source = ASTSource(kernel, signature, constants, aligned)
    launch_options = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, target=target, options=launch_options)


def resources(compiled, target: GPUTarget) -> dict:
    """Registers, stack (which is where registers spill to), shared memory, tensor-core use."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        scratch = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
        return {
            "registers": max(map(int, registers)),
            "stack": sum(map(int, scratch)),
            "shared": compiled.metadata.shared,
            "matrix": "v_mfma" in assembly,
        }
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "matrix": bool(re.search(r"mma\.sync|wgmma\.|tcgen05\.mma", compiled.asm["ptx"])),
        "drops_nan": bool(re.search(r"\b(min|max)\.f32", compiled.asm["ptx"])),
    }


def main() -> None:
    backend, architecture = sys.argv[1].split(":")
    target = GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget("hip", architecture, 64)
    results = {}
    for name, kernel, types, options in kernels():
        if len(sys.argv) < 3 or re.search(sys.argv[2], name):
            results[name] = resources(compile_kernel(kernel, types, options, target), target)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
