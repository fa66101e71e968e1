"""Log-probs of M tokens for each row of logits, forward and with the gradient, against log_softmax and gather.

python benchmarks/bench_token_log_probs.py [--json results.json]
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Case, compiled, main, peers
from grpo.kernels import token_log_probs

N, V, DTYPE = (65536, 16384, torch.bfloat16) if DEVICE.type == "cuda" else (256, 16384, torch.float32)


def eager(logits: Tensor, tokens: Tensor) -> Tensor:
    """As the reference trainer computes them."""
    return logits.float().log_softmax(-1).gather(1, tokens)


def liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, tokens: -liger_cross_entropy(logits, tokens[:, 0], reduction="none")


def fla():
    from fla.modules.fused_cross_entropy.ops import cross_entropy_loss

    return lambda logits, tokens: -cross_entropy_loss(logits, tokens[:, 0])[0]


def with_gradient(log_probs_of, logits: Tensor, tokens: Tensor):
    """A run of forward and backward."""
    logits = logits.detach().requires_grad_()

    def run():
        return torch.autograd.grad(log_probs_of(logits, tokens).sum(), logits)

    return run


def cases(options: argparse.Namespace) -> list[Case]:
    """M = 8 and M = 1, forward alone and forward with backward. Peers take one token a row."""
    logits = (2 * torch.randn(N, V, device=DEVICE)).to(DTYPE)
    tokens = torch.randint(0, V, (N, 8), device=DEVICE)
    rows = slice(0, 64)
    truth = logits[rows].double().log_softmax(-1).gather(1, tokens[rows])
    error = {
        side: (op(logits[rows], tokens[rows]) - truth).abs().max().item()
        for side, op in {"ours": token_log_probs, "eager": eager}.items()
    }
    result = []
    for M in (8, 1):
        ops = {"eager": eager, "ours": token_log_probs, **compiled(eager, options)}
        if M == 1:
            ops |= peers(liger_kernel=liger, fla=fla)
        chosen = tokens[:, :M].contiguous()
        read = logits.numel() * logits.element_size()
        sizes = {"N": N, "V": V, "M": M, "dtype": str(DTYPE)}
        forward = {side: (lambda op=op, chosen=chosen: op(logits, chosen)) for side, op in ops.items()}
        both = {side: with_gradient(op, logits, chosen) for side, op in ops.items()}
        result.append(Case(f"forward M={M}", sizes, forward, error, bytes=read))
        result.append(Case(f"forward + backward M={M}", sizes, both, error, bytes=3 * read))
    return result


if __name__ == "__main__":
    main(__doc__, cases)
