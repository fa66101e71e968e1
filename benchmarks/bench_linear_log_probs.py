"""Log-probs under a projection without the logits in memory, against logits in full.

python benchmarks/bench_linear_log_probs.py [--json results.json]
"""

import argparse

import torch
from torch import Tensor

from grpo.kernels import linear_token_log_probs
from harness import DEVICE, Case, Result, Target, compiled, main, peers

ON_GPU = DEVICE.type == "cuda"
N, V, DTYPE = (65536, 16384, torch.bfloat16) if ON_GPU else (1024, 16384, torch.float32)
WIDTHS = (1536, 768, 3200) if ON_GPU else (256,)


def eager(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As the reference trainer computes them: all logits, in the model's dtype, then in fp32."""
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, tokens)


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


def cases(options: argparse.Namespace) -> list[Case]:
    """M = 8 and (on a GPU, for the peers) M = 1, forward alone and with both gradients."""
    result = []
    for D in WIDTHS:
        hidden = torch.randn(N, D, device=DEVICE).to(DTYPE)
        weight = (2 * torch.randn(V, D, device=DEVICE) / D**0.5).to(DTYPE)  # logits of entropy about 7.7 nats
        tokens = torch.randint(0, V, (N, 8), device=DEVICE)
        rows = slice(0, 64)
        truth = (hidden[rows].double() @ weight.double().t()).log_softmax(-1).gather(1, tokens[rows])
        error = {
            side: (op(hidden[rows], weight, tokens[rows]) - truth).abs().max().item()
            for side, op in {"ours": linear_token_log_probs, "eager": eager}.items()
        }
        for M in (8, 1) if ON_GPU else (8,):  # the peers of M = 1 need a GPU
            ops = {"eager": eager, "ours": linear_token_log_probs, **compiled(eager, options)}
            if M == 1:
                ops |= peers(**PEERS)
            chosen = tokens[:, :M].contiguous()
            sizes = {"N": N, "V": V, "D": D, "M": M, "dtype": str(DTYPE)}
            forward = {side: (lambda op=op, a=hidden, b=weight, c=chosen: op(a, b, c)) for side, op in ops.items()}
            both = {side: with_gradients(op, (hidden, weight), chosen) for side, op in ops.items()}
            forward["matrix product"] = products(hidden, weight, 1)
            both["matrix products"] = products(hidden, weight, 3)
            gradients = (N + V) * D * hidden.element_size()
            forward = Case(f"D={D} forward M={M}", sizes, forward, error, flop=2 * N * V * D)
            both = Case(
                f"D={D} forward + backward M={M}", sizes, both, error, flop=6 * N * V * D, output_bytes=gradients
            )
            result += [forward, both]
    return result


def targets(results: dict[str, Result]) -> list[Target]:
    """Wanted: N=65536, D=1536. Scratch memory is held against fp32 logits, which eager makes beside its own."""
    wanted, logits = [], 4 * N * V
    for M in (8, 1):
        forward, both = results[f"D=1536 forward M={M}"], results[f"D=1536 forward + backward M={M}"]
        scratch = both.sides["ours"]["peak_bytes"] - both.output_bytes
        wanted += [
            Target(f"forward M={M}, time of a matrix product", forward.ratio("ours", "matrix product"), 1.35, True),
            Target(f"both M={M}, time of three products", both.ratio("ours", "matrix products"), 1.4, True),
            Target(f"both M={M}, scratch as share of fp32 logits", scratch / logits, 0.05, True),
        ]
    for name in ("forward", "forward + backward"):
        result = results[f"D=1536 {name} M=1"]
        rivals = [side for side in result.sides if side in PEERS]
        wanted += [Target(f"{name}, speed of {side}", result.ratio(side), 1) for side in rivals]
    return wanted


if __name__ == "__main__":
    main(__doc__, cases, targets)
