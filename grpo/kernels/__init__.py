"""Fused operations of GRPO on a large vocabulary: sampling, log-probs, log-probs of a projection, policy loss.

Each op has one public function, a `torch.library` custom op, a plain-torch reference that is also the CPU path, and
Triton kernels that are imported only when they run. `impl` chooses: "auto" takes the kernels on a GPU where they
support the inputs, "triton" insists on them, "reference" never uses them.
"""

from grpo.kernels.linear_log_probs import linear_token_log_probs
from grpo.kernels.linear_loss import fused_linear_loss
from grpo.kernels.log_probs import token_log_probs
from grpo.kernels.projection import project_logits
from grpo.kernels.ratio_loss import clipped_ratio_loss
from grpo.kernels.sample_and_score import ScoredSample, sample_and_score, sample_projection
from grpo.kernels.sampling import Sample, sample_tokens
from grpo.kernels.uniform import philox_uniform

__all__ = [
    "Sample",
    "ScoredSample",
    "clipped_ratio_loss",
    "fused_linear_loss",
    "linear_token_log_probs",
    "philox_uniform",
    "project_logits",
    "sample_and_score",
    "sample_projection",
    "sample_tokens",
    "token_log_probs",
]
