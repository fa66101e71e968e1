"""Draws of tokens from rows of logits, with their log-probs, from one read of each row."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo.kernels.dispatch import check_temperature, row_obstacle, use_triton
from grpo.kernels.philox import MAX_SAMPLES, MAX_VOCABULARY
from grpo.kernels.sampling_reference import new_sample, sample_rows


class Sample(NamedTuple):
    """Result of `sample_tokens`."""

    tokens: Tensor
    """[N, num_samples] int64."""
    log_probs: Tensor
    """[N, num_samples] fp32, of the full tempered distribution."""
    kept_log_probs: Tensor
    """[N, num_samples] fp32, of the truncated one."""
    kept_mass: Tensor
    """[N] fp32, probability of the kept columns under the full tempered distribution; 1 without truncation."""


def sample_tokens(
    logits: Tensor, *, num_samples: int = 1, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    seed: int | Tensor, step: int | Tensor = 0, row_ids: Tensor | None = None, noise: Tensor | None = None,
    impl: str = "auto",
) -> Sample:  # fmt: skip
    """Draws `num_samples` tokens from each row of `logits` [N, V]. No gradient flows through.

    The distribution is softmax(logits / temperature), truncated as LlamaGen does: `top_k` keeps every logit that is not
    below the k-th largest; of the survivors, renormalised, `top_p` keeps the shortest prefix in descending order whose
    probability exceeds p, at least one column, the lowest index first among equals. `top_k` <= 0 or >= V and
    `top_p` >= 1 switch the filter off.

    The draw is an exact two-level Gumbel-max: over the log-sum-exp of the kept columns of each block of 128, then over
    the columns of the chosen block, the lowest index on a tie. Its noise is a function of (`seed`, `step`, the row's
    entry of `row_ids` [N] int64 (default 0 .. N-1), the sample's index) alone, see `philox.py`; `seed` and `step` are
    integers or 0-dim int64 tensors on the device, the seed modulo 2**64 and the step modulo 2**32. `noise`
    [N, num_samples, V] fp32 replaces it by the flat rule argmax(logits / temperature + noise) over the kept columns.

    A NaN or +inf is never drawn; the log-probs and the kept mass of its row are NaN. So are those of a row without any
    finite logit, whose tokens are 0. Raises ValueError for shapes or values out of range.
    """
    if logits.ndim != 2 or not 0 < logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must be [N, V] with 0 < V <= {MAX_VOCABULARY}, not {tuple(logits.shape)}")
    if not 0 < num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples is {num_samples}; it must lie in 1 .. {MAX_SAMPLES}")
    check_temperature(temperature)
    if not top_p >= 0:
        raise ValueError(f"top_p is {top_p}; it must not be negative")
    N, V = logits.shape
    if row_ids is not None and (row_ids.shape != (N,) or row_ids.dtype != torch.int64):
        raise ValueError(f"row_ids must be [{N}] int64, not {list(row_ids.shape)} {row_ids.dtype}")
    if noise is not None and noise.shape != (N, num_samples, V):
        raise ValueError(f"noise must be {[N, num_samples, V]}, not {list(noise.shape)}")
    top_k = top_k if 0 < top_k < V else 0
    row_ids = torch.arange(N, device=logits.device) if row_ids is None else row_ids
    seed, step = _scalar("seed", seed, logits.device), _scalar("step", step, logits.device)
    tokens, log_probs, kept_log_probs, kept_mass = torch.ops.grpo.sample_tokens(
        logits.detach(), seed, step, row_ids, noise, num_samples, temperature, top_k, min(top_p, 1.0), impl
    )
    return Sample(tokens, log_probs, kept_log_probs if top_k or top_p < 1 else log_probs, kept_mass)


def _scalar(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """A 0-dim int64 tensor, made by a fill and not by a copy, so that a CUDA graph can capture it."""
    if isinstance(value, Tensor):
        if value.ndim or value.dtype != torch.int64 or value.device != device:
            found = f"{list(value.shape)} {value.dtype} on {value.device}"
            raise ValueError(f"{name} must be an integer or a 0-dim int64 tensor on {device}, not {found}")
        return value
    if isinstance(value, float):
        raise ValueError(f"{name} is {value}; it must be an integer")
    if not -(2**63) <= value < 2**63:
        value = (value + 2**63) % 2**64 - 2**63
    return torch.full((), value, dtype=torch.int64, device=device)


@torch.library.custom_op("grpo::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor, seed: Tensor, step: Tensor, row_ids: Tensor, noise: Tensor | None,
    num_samples: int, temperature: float, top_k: int, top_p: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = (logits, seed, step, row_ids, noise, num_samples, temperature, top_k, top_p)
    obstacle = row_obstacle(logits=logits)
    if logits.shape[1] > 16384:
        obstacle = f"a row of {logits.shape[1]} columns does not fit in registers; the limit is 16384"
    if use_triton(impl, op="sample_tokens", device=logits.device, obstacle=obstacle):
        from grpo.kernels.triton_sampling import launch

        with torch.cuda.device_of(logits):
            return launch(*arguments)
    return sample_rows(*arguments)


_sample_tokens.register_fake(lambda logits, seed, step, ids, noise, num_samples, *_: new_sample(logits, num_samples))
