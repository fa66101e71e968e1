"""Run by torchrun on two ranks: every check of `CHECKS`, its outcome written to the file named on the command line."""

import json
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo.config import Optimizer
from grpo.kernels import Dropout
from grpo.models import GPT
from grpo.parallel import (
    World,
    all_reduce_sums,
    broadcast_object,
    clip_grad_norm,
    distributed,
    full_state_dict,
    gathered,
    grad_scaler,
    gradient_sync,
    load_full_state_dict,
)
from grpo.training import GuardedOptimizer, MovingAverage
from tests.parallel.toy import CONFIG, loss_sum, make_batch, make_model, make_parallel, plain_gradients, relative_error


def gradients_equal_plain(
    world: World, *, parts: int = 1, sync_last_only: bool = False, drops: bool = False, **how
) -> None:
    model = make_parallel(world, **how)
    tokens, class_ids = make_batch()
    batch = tokens, class_ids, torch.arange(len(tokens))
    mine = [tensor.chunk(world.size)[world.rank].chunk(parts) for tensor in batch]
    for part, (some_tokens, some_ids, row_ids) in enumerate(zip(*mine, strict=True)):
        gradient_sync(model, not sync_last_only or part == parts - 1)
        dropout = Dropout(row_ids) if drops else None
        (loss_sum(model, some_tokens, some_ids, dropout) * world.size / tokens.numel()).backward()
    for name, expected in plain_gradients(drops=drops).items():
        gradient = model.get_parameter(name).grad.full_tensor()
        assert relative_error(gradient, expected) < 2e-5, name


def clipped_norm_is_global(world: World) -> None:
    model = make_parallel(world, data_parallel="hsdp", shard_size=1)
    tokens, class_ids = (tensor.chunk(world.size)[world.rank] for tensor in make_batch())
    (loss_sum(model, tokens, class_ids) / tokens.numel()).backward()
    with torch.no_grad():
        model.hidden(tokens[:, :-1], class_ids)  # leaves the root's parameters gathered
    norm = clip_grad_norm(model, 0.01)
    expected = torch.stack([gradient.norm() for gradient in plain_gradients().values()]).norm()
    assert relative_error(norm, expected) < 1e-5
    clipped = torch.stack([parameter.grad.full_tensor().norm() for parameter in model.parameters()]).norm()
    assert abs(float(clipped) - 0.01) < 1e-6


def gathered_stays_gathered(world: World) -> None:
    model, plain = make_parallel(world), make_model()
    tokens, class_ids = make_batch()
    for _ in range(2):  # also after training steps, and after an exception
        try:
            with gathered(model):
                weight = model.output.weight
                assert not isinstance(weight, DTensor)
                cache = model.init_cache(len(class_ids), dtype=weight.dtype, device="cpu")
                model.prefill(class_ids, cache)
                model.extend(tokens[:, 0], torch.tensor(1), cache)
                assert torch.equal(model.hidden(tokens[:, :-1], class_ids), plain.hidden(tokens[:, :-1], class_ids))
                assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
                assert not model(tokens[:, :-1], class_ids).requires_grad
                raise KeyError
        except KeyError:
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        (loss_sum(model, tokens, class_ids) / tokens.numel()).backward()  # the hooks are back
        for name, expected in plain_gradients().items():
            assert relative_error(model.get_parameter(name).grad.full_tensor(), expected) < 2e-5, name
        model.zero_grad()
    hidden = model.hidden(tokens[:, :-1], class_ids)
    assert isinstance(model.layers[0].attention.wo.weight, DTensor)  # blocks are resharded after a forward again
    assert hidden.requires_grad


def loads_from_rank_zero_into_meta(world: World) -> None:
    with torch.device("meta"):
        model = GPT(CONFIG)
    model = make_parallel(world, model)
    expected = make_model().state_dict()
    load_full_state_dict(model, expected if world.is_main else None, device=world.device)
    tokens, class_ids = make_batch()
    assert torch.equal(model(tokens[:, :-1], class_ids), make_model()(tokens[:, :-1], class_ids))
    whole = full_state_dict(model)
    assert whole.keys() == (expected.keys() if world.is_main else set())
    assert all(torch.equal(whole[name], expected[name]) for name in whole)


def bf16_computes_in_bf16(world: World) -> None:
    model = make_parallel(world, mixed_precision="bf16")
    tokens, class_ids = make_batch()
    hidden = model.hidden(tokens[:, :-1], class_ids)
    assert hidden.dtype == model.output.weight.dtype == torch.bfloat16
    loss_sum(model, tokens, class_ids).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def overflow_is_noticed_by_all(world: World, *, in_loss: bool = False, **how) -> None:
    """An infinite loss, or gradient in one shard, of one rank makes every rank skip the step and halve the scale."""
    model = make_parallel(world, mixed_precision="fp16", **how)
    scaler = grad_scaler("fp16", world.device)
    guarded = GuardedOptimizer(model, Optimizer(lr=1e-3), total_steps=9, max_skipped_steps=3, scaler=scaler)
    tokens, class_ids = make_batch()
    before = full_state_dict(model)
    before = {name: value.clone() for name, value in before.items()}
    for overflows in (True, False):
        factor = torch.inf if overflows and world.is_main and in_loss else 1e-5
        guarded.backward(loss_sum(model, tokens, class_ids) / tokens.numel() * factor)
        if overflows and world.is_main and not in_loss:
            model.output.weight.grad.to_local()[0, 0] = torch.inf
        guarded.step()
        assert (guarded.skipped, scaler.get_scale()) == (1, 2.0**15)
        unchanged = [torch.equal(value, before[name]) for name, value in full_state_dict(model).items()]
        assert all(unchanged) == overflows or not world.is_main


def average_equals_plain(world: World, *, into: bool = False, **how) -> None:
    """Of the weights that a training step with gathered parameters leaves, also as the weights of a second model."""
    model = make_parallel(world, **how)
    other = make_parallel(world, **how).requires_grad_(False) if into else None
    tokens, class_ids = make_batch()
    before = {name: weight.full_tensor().clone() for name, weight in model.named_parameters()}
    average = MovingAverage(model, 0.75, into=other)
    guarded = GuardedOptimizer(model, Optimizer(lr=0.1), total_steps=9, max_skipped_steps=3, average=average)
    guarded.backward(loss_sum(model, tokens, class_ids) / tokens.numel())
    with torch.no_grad():
        (other or model).hidden(tokens[:, :-1], class_ids)  # leaves the root's parameters gathered
    guarded.step()
    means = average.state_tensors()
    for name, weight in model.named_parameters():
        assert isinstance(means[name], DTensor)
        assert torch.equal(means[name].full_tensor(), torch.lerp(before[name], weight.full_tensor(), 0.25)), name
    with average.swapped():
        hidden = model.hidden(tokens[:, :-1], class_ids)
    plain = make_model()
    plain.load_state_dict({name: mean.full_tensor() for name, mean in means.items()})
    assert relative_error(hidden, plain.hidden(tokens[:, :-1], class_ids)) < 1e-5
    if into:
        assert relative_error(other.hidden(tokens[:, :-1], class_ids), hidden) < 1e-6


def sums_are_global(world: World) -> None:
    sums = all_reduce_sums({"b": torch.tensor(0.1, dtype=torch.float64), "a": world.rank, "c": 2**53 - 1})
    assert sums == {"a": 1.0, "b": 0.2, "c": float(2**54 - 2)}
    assert broadcast_object({"from": world.rank}, source=1) == {"from": 1}


CHECKS = {
    "fsdp": gradients_equal_plain,
    "sdp": lambda world: gradients_equal_plain(world, data_parallel="sdp"),
    "hsdp 1x2": lambda world: gradients_equal_plain(world, data_parallel="hsdp"),
    "hsdp 2x1": lambda world: gradients_equal_plain(world, data_parallel="hsdp", shard_size=1),
    "full recomputation": lambda world: gradients_equal_plain(world, recompute="full"),
    "selective recomputation": lambda world: gradients_equal_plain(world, recompute="selective"),
    "accumulation": lambda world: gradients_equal_plain(world, parts=4),
    "accumulation, one reduction": lambda world: gradients_equal_plain(world, parts=4, sync_last_only=True),
    "accumulation, hsdp, recomputation": lambda world: gradients_equal_plain(
        world, parts=2, sync_last_only=True, data_parallel="hsdp", shard_size=1, recompute="full"
    ),
    "dropout": lambda world: gradients_equal_plain(world, drops=True),
    "dropout, accumulation, full recomputation": lambda world: gradients_equal_plain(
        world, drops=True, parts=2, recompute="full"
    ),
    "dropout, hsdp, selective recomputation": lambda world: gradients_equal_plain(
        world, drops=True, data_parallel="hsdp", shard_size=1, recompute="selective"
    ),
    "clipping": clipped_norm_is_global,
    "gathered": gathered_stays_gathered,
    "weights": loads_from_rank_zero_into_meta,
    "bf16": bf16_computes_in_bf16,
    "fp16 overflow": overflow_is_noticed_by_all,
    "fp16 overflow, hsdp 1x2": lambda world: overflow_is_noticed_by_all(world, data_parallel="hsdp"),
    "fp16 overflow, hsdp 2x1": lambda world: overflow_is_noticed_by_all(
        world, in_loss=True, data_parallel="hsdp", shard_size=1
    ),
    "moving average": average_equals_plain,
    "moving average into another model, hsdp 2x1": lambda world: average_equals_plain(
        world, into=True, data_parallel="hsdp", shard_size=1
    ),
    "sums": sums_are_global,
}


def main(output: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    with distributed(60) as world:
        assert world.size == 2
        assert isinstance(make_parallel(world), FSDPModule)
        for name, check in CHECKS.items():
            try:
                check(world)
                outcomes[name] = "passed"
            except Exception:
                outcomes[name] = traceback.format_exc()
    output.with_suffix(f".{world.rank}").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
