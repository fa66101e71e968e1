"""A tiny GPT with data, its loss and its plain single-process gradients: what the parallel ones are compared to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config import ActivationCheckpoint, Compile, Parallel, Training
from grpo.kernels import Dropout
from grpo.models import GPT, GPTConfig
from grpo.parallel import World, build_mesh, parallelize

RATES = {"dropout": 0.1, "class_dropout": 0.5}  # which act where masks are given
CONFIG = GPTConfig(dim=32, n_layer=3, n_head=2, vocab_size=50, block_size=16, num_classes=5, multiple_of=32, **RATES)


def make_model() -> GPT:
    """The same weights every time, the output projection included."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_batch(step: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    """Codes [size, T] and classes [size] of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, CONFIG.vocab_size, (size, CONFIG.block_size), generator=generator)
    return tokens, torch.randint(0, CONFIG.num_classes + 1, (size,), generator=generator)


def loss_sum(model: nn.Module, tokens: Tensor, class_ids: Tensor, dropout: Dropout | None = None) -> Tensor:
    """Summed cross-entropy, with the output projection applied outside of the model's forward."""
    hidden = model.hidden(tokens[:, :-1], class_ids, dropout)  # [B, T, D]
    logits = F.linear(hidden, model.output.weight).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


def plain_gradients(step: int = 0, *, drops: bool = False) -> dict[str, Tensor]:
    """Gradients of the mean loss over the whole batch, by parameter name, without any of `grpo.parallel`."""
    model = make_model()
    tokens, class_ids = make_batch(step)
    dropout = Dropout(torch.arange(len(tokens))) if drops else None
    (loss_sum(model, tokens, class_ids, dropout) / tokens.numel()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def make_parallel(
    world: World,
    model: nn.Module | None = None,
    *,
    data_parallel: str = "fsdp",
    shard_size: int = -1,
    recompute: str = "none",
    mixed_precision: str = "fp32",
) -> nn.Module:
    """A parallelized model, by default `make_model()`."""
    parallel = Parallel(data_parallel=data_parallel, shard_size=shard_size)
    return parallelize(
        make_model() if model is None else model,
        mesh=build_mesh(parallel, world),
        parallel=parallel,
        compile=Compile(),
        activation_checkpoint=ActivationCheckpoint(mode=recompute),
        training=Training(mixed_precision=mixed_precision),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
