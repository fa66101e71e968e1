"""Every kernel once at the size of its target: what a profiler of single kernels (ncu) is pointed at. Needs a GPU."""

import torch

from grpo.kernels import clipped_ratio_loss, linear_token_log_probs, sample_tokens, token_log_probs

V, D, M = 16384, 1536, 8


def main() -> None:
    """The variants that the trainer runs, at sizes that fill the GPU but replay quickly."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(8192, V, device="cuda")
    sample_tokens(logits[:512], num_samples=M, seed=0)
    sample_tokens(logits[:512], num_samples=M, seed=0, top_k=1000, top_p=0.9)
    tokens = torch.randint(0, V, (len(logits), M), device="cuda")
    rows = logits.bfloat16().requires_grad_()
    log_probs, entropy = token_log_probs(rows, tokens, return_entropy=True)
    (log_probs.sum() + entropy.sum()).backward()
    hidden = torch.randn(len(logits), D, device="cuda").bfloat16()
    weight = (2 * torch.randn(V, D, device="cuda") / D**0.5).bfloat16()
    linear_token_log_probs(hidden, weight, tokens, return_entropy=True)
    new = torch.randn(16, M, 512, device="cuda")
    clip = {"clip_low": 0.2, "clip_high": 0.28, "kl": "k3", "kl_coef": 0.1}
    advantages, weights = torch.randn(16, M, device="cuda"), torch.full_like(new, 1 / new.numel())
    clipped_ratio_loss(new, new + 0.1, advantages, weights=weights, ref_log_probs=new - 0.1, **clip)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
