"""Fused operations of GRPO on a large vocabulary, and of a sampling step.

Twelve are custom ops of `torch.library`, each with a plain-torch reference that is also the CPU path, and all but one
with Triton kernels that are imported only when they run (`triton_*.py`):

    sample_tokens             sampling.py      reference: sampling_reference.py
    token_log_probs           log_probs.py     reference: row_math.py
    linear_token_log_probs    log_probs.py     reference: projection.py, row_math.py
    linear_kl                 divergence.py    torch only, no kernels of its own
    clipped_ratio_loss        ratio_loss.py    reference: ratio_reference.py
    drop_features             dropout.py       reference: in the same file
    philox_uniform            uniform.py       reference: in the same file
    cached_attention          cached_attention.py
    add_rms_norm, silu_mul    norm_and_gate.py
    norm_linear, linear_add   few_rows.py

Two are made of these: `sample_and_score` and `sample_projection`. One is plain torch: `project_logits`. `Draw` is the
settings of a draw as one value, `Dropout` the masks of a forward. `impl` chooses: "auto" takes the kernels on a GPU
where they support the inputs, "triton" insists on them, "reference" never uses them.
"""

from grpo.kernels.cached_attention import attention_obstacle, cached_attention
from grpo.kernels.dispatch import use_triton
from grpo.kernels.divergence import linear_kl
from grpo.kernels.draw import Draw, ScoredSample, sample_and_score, sample_projection
from grpo.kernels.dropout import Dropout, drop_features
from grpo.kernels.few_rows import MAX_ROWS, linear_add, norm_linear, sums_of_squares
from grpo.kernels.log_probs import linear_token_log_probs, token_log_probs
from grpo.kernels.norm_and_gate import add_rms_norm, silu_mul
from grpo.kernels.philox import RandomStream
from grpo.kernels.projection import CHUNK_ELEMENTS, KEPT_ELEMENTS, project_logits
from grpo.kernels.ratio_loss import clipped_ratio_loss
from grpo.kernels.sampling import Sample, sample_tokens
from grpo.kernels.uniform import philox_uniform
