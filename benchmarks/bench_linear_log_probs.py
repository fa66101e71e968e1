"""Log-probs under a projection without the logits in memory, against logits in full.

python benchmarks/bench_linear_log_probs.py [--json results.json]
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Case, compiled, main, peers
from grpo.kernels import linear_token_log_probs

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


def with_gradients(log_probs_of, inputs: tuple[Tensor, Tensor], tokens: Tensor):
    """A run of forward and backward. Some peers return the mean: the gradient of the mean is taken of all."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]

    def run():
        return torch.autograd.grad(log_probs_of(*inputs, tokens).mean(), inputs)

    return run


def cases(options: argparse.Namespace) -> list[Case]:
    """M = 8 and M = 1, forward alone and with both gradients. Peers take one token a row."""
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
        for M in (8, 1):
            ops = {"eager": eager, "ours": linear_token_log_probs, **compiled(eager, options)}
            if M == 1:
                ops |= peers(cut_cross_entropy=cut_cross_entropy, liger_kernel=liger, fla=fla)
            chosen = tokens[:, :M].contiguous()
            sizes = {"N": N, "V": V, "D": D, "M": M, "dtype": str(DTYPE)}
            forward = {side: (lambda op=op, a=hidden, b=weight, c=chosen: op(a, b, c)) for side, op in ops.items()}
            both = {side: with_gradients(op, (hidden, weight), chosen) for side, op in ops.items()}
            result.append(Case(f"D={D} forward M={M}", sizes, forward, error, flop=2 * N * V * D))
            result.append(Case(f"D={D} forward + backward M={M}", sizes, both, error, flop=6 * N * V * D))
    return result


if __name__ == "__main__":
    main(__doc__, cases)
