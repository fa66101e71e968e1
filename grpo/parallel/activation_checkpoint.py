"""Activation checkpointing of single blocks."""

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_ATTENTIONS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_KEPT = ("mm", "addmm", "bmm", *(f"_scaled_dot_product_{attention}" for attention in _ATTENTIONS))
_KEPT_OPERATIONS = [getattr(torch.ops.aten, name).default for name in _KEPT]


def checkpoint_activations(block: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Make a block recompute activations in its backward, in place (Chen et al. 2016, arXiv:1604.06174).

    Mode full keeps the block's inputs only; selective also the results of matrix products and attention. The block's
    class is replaced by a subclass whose forward is checkpointed, so that module, parameter and state-dict names stay
    as they are, and identical blocks still share one compilation.
    """
    if mode != "none":
        block_class: type = type(block)
        block.__class__ = _checkpointed_class(block_class, mode)


@functools.cache
def _checkpointed_class(block_class: Any, mode: str) -> type[nn.Module]:
    select = functools.partial(create_selective_checkpoint_contexts, _KEPT_OPERATIONS)
    # Random masks are functions of row numbers, so there is no generator whose state would have to come back.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    options |= {"context_fn": select} if mode == "selective" else {}

    class Checkpointed(block_class):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)
            return checkpoint(super().forward, *args, **options, **kwargs)

    Checkpointed.__name__ = Checkpointed.__qualname__ = f"Checkpointed{block_class.__name__}"
    return Checkpointed
