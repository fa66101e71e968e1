"""Log-probs of M tokens for each row of logits, forward and with the gradient, against log_softmax and gather.

python benchmarks/bench_token_log_probs.py [--json results.json]
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels import token_log_probs
from harness import DEVICE, Case, Target, compiled, main, peers

N, V, DTYPE = (65536, 16384, torch.bfloat16) if DEVICE.type == "cuda" else (256, 16384, torch.float32)


def eager(logits: Tensor, tokens: Tensor) -> Tensor:
    """As the reference trainer computes them."""
    return logits.float().log_softmax(-1).gather(1, tokens)


def with_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The variant that the trainer runs. The entropy takes part in the gradient as in an entropy bonus."""
    log_probs, entropy = token_log_probs(logits, tokens, return_entropy=True)
    return log_probs + 0 * entropy[:, None] if logits.requires_grad else log_probs


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


def gradient_alone(log_probs_of, logits: Tensor, tokens: Tensor):
    """A run of backward, over the graph of one forward that the first run makes."""
    logits, made = logits.detach().requires_grad_(), []

    def run():
        if not made:
            made.append(log_probs_of(logits, tokens))
        return torch.autograd.grad(made[0], logits, torch.ones_like(made[0]), retain_graph=True)

    return run


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """M = 8 and M = 1, forward, both, and our backward beside eager's. Peers take one token a row."""
    logits = (2 * torch.randn(N, V, device=DEVICE)).to(DTYPE)
    tokens = torch.randint(0, V, (N, 8), device=DEVICE)

    def errors():
        rows = slice(0, 64)
        truth = logits[rows].double().log_softmax(-1).gather(1, tokens[rows])
        ops = {"ours": token_log_probs, "with entropy": with_entropy, "eager": eager}
        return {side: (op(logits[rows], tokens[rows]) - truth).abs().max().item() for side, op in ops.items()}

    for M in (8, 1):
        ops = {"eager": eager, "ours": token_log_probs, "with entropy": with_entropy, **compiled(eager, options)}
        if M == 1:
            ops |= peers(liger_kernel=liger, fla=fla)
        inputs = {side: logits.clone() if side == "liger_kernel" else logits for side in ops}  # it writes over them
        chosen = tokens[:, :M].contiguous()
        read = logits.numel() * logits.element_size()
        sizes = {"N": N, "V": V, "M": M, "dtype": str(DTYPE)}
        forward = {side: (lambda op=op, x=inputs[side], chosen=chosen: op(x, chosen)) for side, op in ops.items()}
        both = {side: with_gradient(op, inputs[side], chosen) for side, op in ops.items()}
        yield Case(f"forward M={M}", sizes, forward, errors, bytes=read)
        yield Case(f"forward + backward M={M}", sizes, both, errors, bytes=3 * read)
        if DEVICE.type == "cuda":  # where other sides would keep gigabytes of their graphs, or lose them
            back = {side: gradient_alone(ops[side], logits, chosen) for side in ("eager", "ours", "with entropy")}
            yield Case(f"backward M={M}", sizes, back, errors, bytes=2 * read)


def share(name: str, side: str = "ours"):
    """The share of the copy bandwidth that a side reaches in a case."""
    return lambda r: r[name].shares["copy_bandwidth"] * r[name].ratio("ours", side)


def eight_for_one(name: str):
    """Time of 8 tokens a row over the time of one."""
    return lambda r: r[f"{name} M=8"].seconds("ours") / r[f"{name} M=1"].seconds("ours")


TARGETS = (  # at N=65536; the trainer's variant is the one with the entropy
    Target("forward, share of copy bandwidth", share("forward M=8"), 0.8, expected="0.75-0.88"),
    Target("forward with entropy, share", share("forward M=8", "with entropy"), 0.8, expected="0.72-0.85"),
    Target("forward, M=8 in time of M=1", eight_for_one("forward"), 1.1, True),
    Target("backward, share of copy bandwidth", share("backward M=8"), 0.75, expected="0.8-0.88"),
    Target("backward with entropy, share", share("backward M=8", "with entropy"), 0.75, expected="0.8-0.88"),
    Target("backward, M=8 in time of M=1", eight_for_one("backward"), 1.1, True),
)


if __name__ == "__main__":
    main(__doc__, cases, TARGETS)
