"""Sampling: G draws and their log-probs from rows of logits, against the reference trainer's way.

    python benchmarks/bench_sampling.py [--json results.json]

"eager" redoes softmax, filter (LlamaGen's top-k and top-p) and multinomial for every draw, as the reference trainer
does.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels import Draw, project_logits, sample_tokens
from harness import DEVICE, Case, Target, compiled, main, peers
from llamagen_filter import filtered

N, V = (512, 16384) if DEVICE.type == "cuda" else (128, 16384)


def eager(logits: Tensor, num_samples: int, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs under the full distribution, one draw after the other."""
    tokens, log_probs = [], []
    for _ in range(num_samples):
        drawn = torch.multinomial(filtered(logits, top_k, top_p).softmax(-1), num_samples=1)
        tokens.append(drawn)
        log_probs.append(logits.log_softmax(-1).gather(1, drawn))
    return torch.cat(tokens, dim=1), torch.cat(log_probs, dim=1)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One and eight draws; no truncation, top-k, top-p, both."""
    logits = 2 * torch.randn(N, V, device=DEVICE)  # entropy about 7.7 nats
    ways = {"eager": eager, **compiled(eager, options)}
    yield projected_case()
    for num_samples, top_k, top_p in ((8, 0, 1.0), (1, 0, 1.0), (8, 1000, 0.9), (8, 1000, 1.0), (8, 0, 0.9)):
        yield case(logits, ways, num_samples, top_k, top_p)


def flash_sampling():
    from flash_sampling import draw

    return draw


def projected_case() -> Case:
    """One draw of each row from hidden states, as a sampling step of 64 images of GPT-XXL makes it."""
    D, rows = (1536, 64) if DEVICE.type == "cuda" else (64, 16)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    hidden = torch.randn(rows, D, device=DEVICE).to(dtype)
    weight = (2 * torch.randn(V, D, device=DEVICE) / D**0.5).to(dtype)
    numbers = torch.arange(rows, device=DEVICE)

    def ours():
        return Draw().sample_projection(hidden, weight, row_ids=numbers, num_samples=1)

    def multinomial(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return eager(project_logits(hidden, weight), 1, 0, 1.0)

    def errors():
        tokens, log_probs, _ = ours()
        truth = (hidden.double() @ weight.double().t()).log_softmax(-1)
        return {"log_probs": (log_probs - truth.gather(1, tokens)).abs().max().item()}

    sides = {"eager": multinomial, **peers(flash_sampling=flash_sampling)}
    return Case(
        name=f"G=1 from a projection, N={rows}",
        sizes={"N": rows, "V": V, "D": D},
        sides={"ours": ours, **{side: (lambda way=way: way(hidden, weight)) for side, way in sides.items()}},
        error=errors,
        bytes=weight.numel() * weight.element_size(),
    )


def case(logits: Tensor, ways: dict, num_samples: int, top_k: int, top_p: float) -> Case:
    def ours():
        return sample_tokens(logits, num_samples=num_samples, top_k=top_k, top_p=top_p, seed=0)

    def errors():
        sample = ours()
        truth = logits.double().log_softmax(-1)
        kept = filtered(logits.double(), top_k, top_p).isfinite()
        return {
            "log_probs": (sample.log_probs - truth.gather(1, sample.tokens)).abs().max().item(),
            "kept_mass": (sample.kept_mass - (truth.exp() * kept).sum(1)).abs().max().item(),
            "draws_outside_the_kept_set": (~kept.gather(1, sample.tokens)).sum().item(),
        }

    theirs = {side: (lambda way=way: way(logits, num_samples, top_k, top_p)) for side, way in ways.items()}
    return Case(
        name=f"G={num_samples}" + f" top-k {top_k}" * (top_k > 0) + f" top-p {top_p}" * (top_p < 1),
        sizes={"N": N, "V": V, "num_samples": num_samples, "top_k": top_k, "top_p": top_p},
        sides={"ours": ours, **theirs},
        error=errors,
        bytes=logits.numel() * logits.element_size(),
    )


ONE, EIGHT, BOTH = "G=1", "G=8", "G=8 top-k 1000 top-p 0.9"
TARGETS = (  # at N=512, V=16384
    Target("one draw, speed of eager", lambda r: r[ONE].ratio("eager"), 3, expected="6-7"),
    Target("one draw, speed of compile", lambda r: r[ONE].ratio("compile"), 2, expected="5"),
    Target("top-k and top-p, speed of eager", lambda r: r[BOTH].ratio("eager"), 8, expected="50"),
    Target("8 draws, time of one", lambda r: r[EIGHT].seconds("ours") / r[ONE].seconds("ours"), 1.6, True, "1.05"),
)


if __name__ == "__main__":
    main(__doc__, cases, TARGETS)
