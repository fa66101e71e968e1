"""Turn a single-device model into a parallel one."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from grpo.config.sections import ActivationCheckpoint, Compile, Parallel, Training
from grpo.parallel.activation_checkpoint import checkpoint_activations
from grpo.parallel.precision import mixed_precision_policy


def parallelize(
    model: nn.Module,
    *,
    mesh: DeviceMesh,
    parallel: Parallel,
    compile: Compile,
    activation_checkpoint: ActivationCheckpoint,
    training: Training,
) -> nn.Module:
    """Apply activation checkpointing, per-block compilation and sharding, in this order, in place.

    One rank is treated like many, so that mixed precision has one mechanism; but it gathers the whole model as one,
    once an optimizer step, because hooks of each block would cost the host more time than the GPU has work. In full
    precision there is nothing left to do, and the parameters stay plain. Weights are loaded afterwards, then the
    optimizer is built.

    Gradients are averaged over ranks: a loss that is to be normalised by a global count must be divided by
    `count / world.size` on each rank. The root's own parameters stay gathered from a forward to its backward, so
    that a loss may use `model.output.weight` outside of `forward`.

    The blocks are in `model.layers`; every other parameter belongs to the root. `model.forward_methods` names what is
    called besides `forward`.
    """
    blocks = blocks_of(model)
    for block in blocks:
        checkpoint_activations(block, activation_checkpoint.mode)
        if compile.enabled:
            block.compile()
    policy = mixed_precision_policy(training.mixed_precision, training.grad_precision)
    if mesh.size() == 1 and policy.param_dtype is None:
        return model  # nothing to shard or cast, and sharded tensors double the time of a small model's step
    reshards = reshards_after_forward(parallel, ranks=mesh.size())
    for block in blocks if shards_blocks(parallel, ranks=mesh.size()) else ():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in getattr(model, "forward_methods", ()):
        register_fsdp_forward_method(model, name)
    vars(model).update(defers_gradient_sync=parallel.defer_gradient_sync, reshards=reshards)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The units of recomputation, compilation and sharding, `model.layers`."""
    return [*cast(Iterable[nn.Module], model.layers)]


def reshards_after_forward(parallel: Parallel, *, ranks: int) -> bool:
    """Whether blocks free their gathered parameters after each forward and backward, or keep them until the step.

    A single rank has nothing to gather: it casts, and what it casts it keeps.
    """
    if parallel.reshard_after_forward == "auto":
        return parallel.data_parallel != "sdp" and ranks > 1
    return parallel.reshard_after_forward == "always"


def shards_blocks(parallel: Parallel, *, ranks: int) -> bool:
    """Whether each block is gathered and reduced by itself. A single rank has nothing to overlap that with."""
    return parallel.shard_blocks and ranks > 1


def gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients over ranks in the coming backward passes, or only add them up on each rank.

    Switch it off for all micro-batches of an optimizer step but the last. It stays on where the recipe does without
    `parallel.defer_gradient_sync`: gradients that are not reduced are those of the whole model, on every rank.
    Parameters that are not freed after a forward stay gathered for the next micro-batch too.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled or not model.defers_gradient_sync)
        model.set_reshard_after_backward(enabled or bool(model.reshards))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Make the model a plain one during the block, e.g. while a rollout calls it hundreds of times.

    All parameters are gathered once, in the dtype of the computation, and calls skip FSDP's hooks: they would cost
    more time than a small step, and their stream switches cannot be captured in a CUDA graph. There are no
    gradients inside. Every rank must enter and leave together.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    try:
        with ExitStack() as stack, torch.no_grad():
            for module in shards:
                stack.enter_context(_without_hooks(module))
            yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Register the sharded parameters on every module, as the optimizer and a checkpoint need them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down, in place, to a global L2 norm of at most `max_norm`.

    Returns the norm before, 0-dim, local, the same on every rank (non-finite if any gradient is).
    """
    reshard(model)  # a forward without backward may have come between, and left parameters gathered
    norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Call a module, and the methods that `register_fsdp_forward_method` wrapped, as if they had no hooks."""
    hooks = module._forward_pre_hooks, module._forward_hooks
    methods = vars(module).keys() & set(getattr(module, "forward_methods", ()))
    wrapped = {name: vars(module).pop(name) for name in methods}
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = hooks
        vars(module).update(wrapped)
