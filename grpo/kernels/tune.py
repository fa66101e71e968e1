"""Measures block sizes of the Triton kernels on the GPU at hand and writes the fastest into the table.

    python -m grpo.kernels.tune                  into the table of this installation, under the GPU's name
    python -m grpo.kernels.tune --out FILE       a copy of the table with it
    python -m grpo.kernels.tune --ops ratio_loss sample

Every candidate must give what the present settings give; one that does not compile, differs or takes longer is left
out. The table is written after every op.
"""

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.kernels.block_sizes import FILE, Table, device_name, find, read_table, trying
from grpo.kernels.cached_attention import cached_attention
from grpo.kernels.few_rows import linear_add, norm_linear
from grpo.kernels.log_probs import linear_token_log_probs, token_log_probs
from grpo.kernels.ratio_loss import clipped_ratio_loss
from grpo.kernels.sampling import sample_tokens

V, M = 16384, 8  # of LlamaGen's tokenizers; completions of an image
WORTH = 0.98  # a candidate must take less than this share of the present time: the rest is noise
TOLERANCE = 1e-3  # relative, in the norm: a sum in another order, not another result

SPLITS = ((128, 8), (128, 4), (128, 16), (64, 8), (64, 4), (64, 2), (32, 4), (32, 2), (32, 1), (256, 8), (256, 16))

Settings = dict[str, int]
Run = Callable[[], Sequence[Tensor]]
Clock = Callable[[Run], float]


class Work(NamedTuple):
    """What an op is measured on."""

    op: str
    size: int
    above: int
    up_to: int | None
    """Sizes that the result is taken for: above < size <= up_to."""
    candidates: Sequence[Settings]
    prepare: Callable[[], Run]
    """Makes the inputs, and the run that returns what a candidate must reproduce."""


def tune(
    works: Sequence[Work], table: Table, device: str, *, clock: Clock, written: Callable[[Table], None] = lambda _: None
) -> Table:
    """`table` with the fastest settings of every work under `device`; `written` is told of it after each."""
    table = copy.deepcopy(table)
    for work in works:
        present = find(table, work.op, work.size, device)
        best = fastest(work, present, clock)
        if best != present:
            bounds = {"above": work.above} | ({} if work.up_to is None else {"up_to": work.up_to})
            entries = table.setdefault(device, {}).setdefault(work.op, [])
            kept = [
                entry for entry in entries if (entry.get("above", 0), entry.get("up_to")) != (work.above, work.up_to)
            ]
            table[device][work.op] = [{**bounds, **best}, *kept]
        written(table)
    return table


def fastest(work: Work, present: Settings, clock: Clock) -> Settings:
    """The best of the candidates, or `present` where none is worth a change."""
    run = work.prepare()
    with trying(work.op, present):
        expected = [output.clone() for output in run()]
        best, limit = present, WORTH * clock(run)
    print(f"\n{work.op} {work.size}: {limit / WORTH * 1e6:.1f} us with {present}", flush=True)
    for candidate in work.candidates:
        settings = {**present, **candidate}
        if settings == present:
            continue
        try:
            with trying(work.op, settings):
                differs = difference(run(), expected)
                seconds = clock(run)
        except Exception as error:  # too many registers, too much shared memory, a shape that Triton refuses
            print(f"  {candidate}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        print(f"  {candidate}: {seconds * 1e6:.1f} us{', DIFFERS' * (not differs < TOLERANCE)}", flush=True)
        if differs < TOLERANCE and seconds < limit:
            best, limit = settings, seconds
    return best


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of two lists of tensors, in the norm; NaN for a NaN."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, expected, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)


def grid(**values: Sequence[int]) -> list[Settings]:
    """Every combination."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def works(device: torch.device) -> Iterator[Work]:
    """The ops at the sizes of LlamaGen's models: a step's rows, of which a GPU needs fewer to be full."""
    rows, warps = 16384, grid(num_warps=(4, 8, 16, 32))
    tiles = [{"TILE": tile, **more} for tile, more in itertools.product((2048, 4096, 8192, 16384), warps)]
    tiles = [entry for entry in tiles if 512 <= entry["TILE"] // entry["num_warps"] <= 2048]

    def logits(rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (2 * torch.randn(rows, V, device=device)).to(dtype)

    def tokens() -> Tensor:
        return torch.randint(0, V, (rows, M), device=device)

    def draws(options: dict) -> Run:
        return sampling(logits(512, torch.float32), options)

    def products_of(D: int) -> Run:
        return projecting(D, tokens())

    for op, options in (("sample", {}), ("sample_truncated", {"top_k": 1000, "top_p": 0.9})):
        yield Work(op, V, V // 2, V, warps, partial(draws, options))
    ahead = [{"TILE": 16384, "num_warps": 16, "AHEAD": 1}]
    ahead += grid(TILE=(1024, 2048), num_warps=(2, 4), AHEAD=(2, 3, 4)) + grid(
        TILE=(4096,), num_warps=(8, 16), AHEAD=(1, 2, 3)
    )
    yield Work("log_probs_forward", V, V // 2, None, ahead, lambda: scoring(logits(rows), tokens()))
    yield Work("log_probs_backward", V, V // 2, None, tiles, lambda: slopes(logits(rows), tokens()))
    products = [
        {"library": 1},
        {"library": 0, "TILE_N": 128, "TILE_V": 128, "num_warps": 8, "num_stages": 3},
        {"library": 0, "TILE_N": 128, "TILE_V": 128, "num_warps": 4, "num_stages": 4},
        {"library": 0, "TILE_N": 128, "TILE_V": 256, "num_warps": 8, "num_stages": 3},
        {"library": 0, "TILE_N": 128, "TILE_V": 256, "num_warps": 8, "num_stages": 4},
        {"library": 0, "TILE_N": 64, "TILE_V": 256, "num_warps": 4, "num_stages": 4},
    ]
    for D, above, up_to in ((768, 512, 1023), (1536, 1023, 2048)):
        yield Work("linear_split", D, above, up_to, products, partial(products_of, D))
    yield Work("linear_merge", 768, 0, None, grid(num_warps=(1, 2, 4, 8)), partial(products_of, 768))
    blocks = grid(TILE=(256, 512, 1024, 2048), num_warps=(4, 8))
    yield Work("ratio_loss", 16 * M * 512, 0, None, blocks, lambda: policy_loss(device))
    yield from sampling_step_works(device)


def sampling_step_works(device: torch.device) -> Iterator[Work]:
    """The ops of a block of GPT-XXL that samples 8 images with guidance: 16 rows of 1536."""
    tiles = [{"TILE": tile, "num_warps": warps} for tile, warps in SPLITS]
    yield Work("cached_attention", 64, 32, 64, tiles, lambda: attending(device))
    names = ("TILE_F", "TILE_D", "num_warps", "num_stages")
    blocks = [(16, 128, 1, 4), (16, 128, 2, 6), (16, 128, 4, 4), (16, 256, 2, 3), (16, 256, 4, 3), (16, 256, 1, 4)]
    blocks += [(32, 128, 2, 4), (32, 128, 4, 4), (32, 64, 2, 6), (64, 64, 4, 4)]
    candidates = [dict(zip(names, block, strict=True)) for block in blocks]
    yield Work("norm_linear", 1536, 0, None, candidates, lambda: gating(device))
    sums = grid(TILE_K=(256,), num_warps=(1, 2), num_stages=(3, 4), SPLITS=(1, 2, 3, 4))
    sums += grid(TILE_K=(512,), num_warps=(1, 2, 4), num_stages=(3,), SPLITS=(1, 2))
    for K, above, up_to in ((1536, 0, 2048), (4096, 2048, None)):
        yield Work("linear_add", K, above, up_to, sums, partial(adding, device, K))


def attending(device: torch.device) -> Run:
    """A row that attends to 400 others."""
    keys, values = (torch.randn(16, 24, 576, 64, device=device).bfloat16() for _ in range(2))
    qkv, angles = torch.randn(16, 3 * 1536, device=device).bfloat16(), torch.randn(576, 32, device=device)
    rotary, row = torch.stack([angles.cos(), angles.sin()], dim=-1), torch.tensor([400], device=device)
    return lambda: [cached_attention(qkv, keys, values, row=row, rotary=rotary, impl="triton")]


def gating(device: torch.device) -> Run:
    """Norm and both matrices of SwiGLU."""
    x, norm = torch.randn(16, 1536, device=device).bfloat16(), torch.ones(1536, device=device).bfloat16()
    gate, up = (torch.randn(4096, 1536, device=device).bfloat16() / 40 for _ in range(2))
    squares = x.float().square().unflatten(1, (-1, 16)).sum(2)
    return lambda: [norm_linear(x, squares, norm, gate, up, eps=1e-5, impl="triton")]


def adding(device: torch.device, K: int) -> Run:
    """A product of K features and its residual."""
    x, weight = (torch.randn(rows, K, device=device).bfloat16() for rows in (16, 1536))
    residual = torch.randn(16, 1536, device=device).bfloat16()
    return lambda: linear_add(x, weight, residual, impl="triton")


def sampling(logits: Tensor, options: dict) -> Run:
    """Draws of every row."""
    return lambda: sample_tokens(logits, num_samples=M, seed=0, impl="triton", **options)[1:]


def scoring(logits: Tensor, tokens: Tensor) -> Run:
    """Log-probs and entropy, as the trainer asks for them."""
    return lambda: token_log_probs(logits, tokens, return_entropy=True, impl="triton")


def slopes(logits: Tensor, tokens: Tensor) -> Run:
    """Their gradient, over the graph of one forward pass."""
    logits.requires_grad_()
    log_probs, entropy = token_log_probs(logits, tokens, return_entropy=True, impl="triton")
    loss = log_probs.sum() + entropy.sum()
    return lambda: torch.autograd.grad(loss, logits, retain_graph=True)


def projecting(D: int, tokens: Tensor) -> Run:
    """The same under a projection of width D."""
    hidden = torch.randn(len(tokens), D, device=tokens.device).bfloat16()
    weight = (2 * torch.randn(V, D, device=tokens.device) / D**0.5).bfloat16()
    return lambda: linear_token_log_probs(hidden, weight, tokens, return_entropy=True, impl="triton")


def policy_loss(device: torch.device) -> Run:
    """The loss of 65536 tokens with its gradient, and its metrics."""
    new = -8 + torch.randn(16, M, 512, device=device)
    old, ref = (new + 0.2 * torch.randn_like(new) for _ in range(2))
    new.requires_grad_()
    advantages, weights = torch.randn(16, M, device=device), torch.full_like(old, 1 / old.numel())

    def run() -> tuple[Tensor, ...]:
        loss, metrics = clipped_ratio_loss(
            new, old, advantages, weights=weights, ref_log_probs=ref,
            clip_low=0.2, clip_high=0.28, kl="k3", kl_coef=0.1, impl="triton",
        )  # fmt: skip
        return torch.autograd.grad(loss, new)[0], torch.stack(list(metrics.values()))

    return run


def gpu_seconds(run: Run, repeats: int = 15) -> float:
    """Median time of a run on the GPU, its inputs not in the cache, the host's launches not counted."""
    cache, times = torch.empty(1 << 28, dtype=torch.int8, device="cuda"), []
    run()
    for _ in range(repeats):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # some milliseconds, for the host to launch what follows
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def write_table(table: Table, file: Path) -> None:
    """As it is read: one line an entry."""
    devices = []
    for device, ops in table.items():
        lines = [f'  "{op}": [\n   ' + ",\n   ".join(map(json.dumps, entries)) + "\n  ]" for op, entries in ops.items()]
        devices.append(f' "{device}": {{\n' + ",\n".join(lines) + "\n }")
    part = file.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(devices) + "\n}\n")
    part.replace(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FILE, help="where the table goes; default: this installation's")
    ops = sorted({work.op for work in works(torch.device("cpu"))})
    parser.add_argument("--ops", nargs="+", choices=ops, metavar="OP", help=f"of {', '.join(ops)} these only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "grpo.kernels.tune: there is no GPU to measure on\n")
    try:
        table = read_table()
        write_table(table, options.out)  # now and not after minutes of measuring
    except (ValueError, OSError) as error:
        parser.exit(2, f"grpo.kernels.tune: {error}\n")
    torch.manual_seed(0)
    chosen = [work for work in works(torch.device("cuda")) if not options.ops or work.op in options.ops]
    tune(chosen, table, device_name(), clock=gpu_seconds, written=partial(write_table, file=options.out))
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
