"""Log-probs under a projection without the logits in memory, against logits in full.

python benchmarks/bench_linear_log_probs.py [--json results.json]
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo.kernels import linear_token_log_probs
from harness import DEVICE, Case, Result, Target, compiled, main, peers

ON_GPU = DEVICE.type == "cuda"
N, V, DTYPE = (65536, 16384, torch.bfloat16) if ON_GPU else (1024, 16384, torch.float32)
WIDTHS = (1536, 768, 3200) if ON_GPU else (256,)
MICRO_BATCH = 18432 if ON_GPU else 64  # rows of the published recipe's: 32 contexts of 576 codes; their logits are kept


def eager(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As the reference trainer computes them: all logits, in the model's dtype, then in fp32."""
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, tokens)


def with_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """The variant that the trainer runs. The entropy takes part in the gradient as in an entropy bonus."""
    log_probs, entropy = linear_token_log_probs(hidden, weight, tokens, return_entropy=True)
    return log_probs + 0 * entropy[:, None] if hidden.requires_grad else log_probs


def streamed(hidden: Tensor, weight: Tensor, tokens: Tensor, rows: int = 4096) -> Tensor:
    """TRL's streamed path in idea: chunks of rows, each computed again in its backward, in plain torch."""
    parts = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([checkpoint(eager, part, weight, chosen, use_reentrant=False) for part, chosen in parts])


def torch_chunked():
    """torch's own projection without the logits, from 2.13 on."""
    linear_cross_entropy = torch.nn.functional.linear_cross_entropy
    return lambda hidden, weight, tokens: -linear_cross_entropy(hidden, weight, tokens[:, 0])


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, tokens: -linear_cross_entropy(hidden, weight, tokens[:, 0], reduction="none")


def liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, tokens: -liger_fused_linear_cross_entropy(hidden, weight, tokens[:, 0])


def fla():
    from fla.modules.fused_linear_cross_entropy.ops import fused_linear_cross_entropy_loss

    return lambda hidden, weight, tokens: -fused_linear_cross_entropy_loss(hidden, tokens[:, 0], weight)


PEERS = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger, "fla": fla}


def with_gradients(log_probs_of, inputs: tuple[Tensor, Tensor], tokens: Tensor):
    """A run of forward and backward. Some peers return the mean: the gradient of the mean is taken of all."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]

    def run():
        return torch.autograd.grad(log_probs_of(*inputs, tokens).mean(), inputs)

    return run


def products(hidden: Tensor, weight: Tensor, number: int):
    """A run of the matrix products alone: logits; and their use in both gradients."""

    def run():
        logits = hidden @ weight.t()
        return logits if number == 1 else (logits @ weight, logits.t() @ hidden)

    return run


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The target's width with M = 8 and (on a GPU, for the peers) M = 1; then other widths. Forward, both gradients."""
    for D in WIDTHS:
        hidden = torch.randn(N, D, device=DEVICE).to(DTYPE)
        weight = (2 * torch.randn(V, D, device=DEVICE) / D**0.5).to(DTYPE)  # logits of entropy about 7.7 nats
        tokens = torch.randint(0, V, (N, 8), device=DEVICE)
        for M in (8, 1) if ON_GPU and WIDTHS[0] == D else (8,):  # the peers of M = 1 need a GPU
            ops = {"eager": eager, "ours": linear_token_log_probs, "with entropy": with_entropy}
            if WIDTHS[0] == D:  # each compilation takes seconds
                ops |= {"streamed": streamed, **compiled(eager, options)}
            if M == 1:
                ops |= peers(**PEERS)
                if hasattr(torch.nn.functional, "linear_cross_entropy"):
                    ops["torch_chunked"] = torch_chunked()
            yield from cases_of(ops, hidden, weight, tokens[:, :M].contiguous())
            if WIDTHS[0] == D and M == 8:
                few = hidden[:MICRO_BATCH], weight, tokens[:MICRO_BATCH]
                yield list(cases_of({side: op for side, op in ops.items() if side != "compile"}, *few))[1]


def cases_of(ops: dict, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Iterator[Case]:
    """Forward alone, and with both gradients."""
    (rows, D), M = hidden.shape, tokens.shape[1]

    def errors():
        some = slice(0, 64)
        truth = (hidden[some].double() @ weight.double().t()).log_softmax(-1).gather(1, tokens[some])
        sides = ("ours", "with entropy", "eager")
        return {side: (ops[side](hidden[some], weight, tokens[some]) - truth).abs().max().item() for side in sides}

    sizes = {"N": rows, "V": V, "D": D, "M": M, "dtype": str(DTYPE)}
    forward = {side: (lambda op=op: op(hidden, weight, tokens)) for side, op in ops.items()}
    forward["matrix product"] = products(hidden, weight, 1)
    few = f" N={rows}" * (rows < N)
    yield Case(f"D={D} forward M={M}{few}", sizes, forward, errors, flop=2 * rows * V * D)
    both = {side: with_gradients(op, (hidden, weight), tokens) for side, op in ops.items()}
    both["matrix products"] = products(hidden, weight, 3)
    gradients = (rows + V) * D * hidden.element_size()
    name = f"D={D} forward + backward M={M}{few}"
    yield Case(name, sizes, both, errors, flop=6 * rows * V * D, output_bytes=gradients)


FORWARD, BOTH = "D=1536 forward M={}", "D=1536 forward + backward M={}"


def scratch(results: dict[str, Result]) -> float:
    """Of both passes beside their results, as a share of the fp32 logits that eager makes beside its own."""
    both = results[BOTH.format(8)]
    return (both.sides["with entropy"]["peak_bytes"] - both.output_bytes) / (4 * N * V)


def times(case: str, M: int, side: str, other: str):
    """Time of a side over that of another."""
    return lambda r: r[case.format(M)].ratio(side, other)


TARGETS = [  # at N=65536, D=1536; the trainer's variant is the one with the entropy; all logits are computed twice
    Target("forward, time of a product", times(FORWARD, 8, "ours", "matrix product"), 1.35, True, "1.32-1.36"),
    Target("forward with entropy", times(FORWARD, 8, "with entropy", "matrix product"), 1.35, True, "1.32-1.36"),
    Target("both, time of three products", times(BOTH, 8, "ours", "matrix products"), 1.4, True, "1.62-1.68"),
    Target("both with entropy", times(BOTH, 8, "with entropy", "matrix products"), 1.4, True, "1.62-1.68"),
    *(
        Target(
            f"both, {images} images of the trainer at once",
            times(f"{BOTH} N={576 * images}", 8, "with entropy", "matrix products"),
            1.4,
            True,
            "1.3",
        )
        for images in (8, 32)  # 8 until 2026-11-26
    ),
    Target("both, scratch as share of fp32 logits", scratch, 0.05, True, "0.11"),
    *(Target(f"forward, speed of {peer}", times(FORWARD, 1, peer, "ours"), 1) for peer in PEERS),
    *(Target(f"forward + backward, speed of {peer}", times(BOTH, 1, peer, "ours"), 1) for peer in PEERS),
    Target("forward, speed of compile", times(FORWARD, 8, "compile", "ours"), 1),
    Target("forward + backward, speed of compile", times(BOTH, 8, "compile", "ours"), 1),
    Target("forward, speed of TRL's streamed way", times(FORWARD, 8, "streamed", "ours"), 1),
    Target("forward + backward, speed of TRL's streamed way", times(BOTH, 8, "streamed", "ours"), 1),
]


if __name__ == "__main__":
    main(__doc__, cases, TARGETS)
