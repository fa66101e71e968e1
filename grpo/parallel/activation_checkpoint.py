"""Activation checkpointing of single blocks."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_ATEN = torch.ops.aten
_KEPT_OPERATIONS = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def checkpoint_activations(block: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Make a block recompute activations in its backward, in place (Chen et al. 2016, arXiv:1604.06174).

    The block's class is replaced by a subclass whose forward is checkpointed, so that module, parameter and
    state-dict names stay as they are, and identical blocks still share one compilation.

    Args:
        mode: full keeps the block's inputs only; selective also keeps the results of matrix products and attention.
    """
    if mode != "none":
        block.__class__ = _checkpointed_class(type(block), mode)


@functools.cache
def _checkpointed_class(block_class: type[nn.Module], mode: str) -> type[nn.Module]:
    context: dict[str, Callable] = {}
    if mode == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_costly_operations)

    class Checkpointed(block_class):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)
            return checkpoint(super().forward, *args, use_reentrant=False, **context, **kwargs)

    Checkpointed.__name__ = Checkpointed.__qualname__ = f"Checkpointed{block_class.__name__}"
    return Checkpointed


def _keep_costly_operations(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _KEPT_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
