"""The sampling engine: the same draws however the work is laid out, no memory kept, a way out of a failed capture."""

import gc
import logging
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.kernels import Draw, sample_tokens
from grpo.models import GPT, MODEL_SPECS, CachedForward, ClassCondition
from grpo.rollout import CodeSampler, cached_sampler, cuda_graphs, sample_codes
from grpo.rollout.autoregressive import parts_of, rows_in_memory
from grpo.rollout.cached_sampler import CachedSampler, bytes_per_sequence
from grpo.rollout.cuda_graphs import Replay
from grpo.rollout.scoring import guide

SETTINGS = [{}, {"cfg_scale": 1.7}, {"cfg_scale": 2.0, "cfg_interval": 6}, {"top_k": 9, "temperature": 0.7}]


def draw(model, rows=6, *, top_k=0, temperature=1.0, **settings):
    condition, row_ids = ClassCondition(torch.arange(rows) % 5), torch.arange(50, 50 + rows)
    how = Draw(top_k=top_k, temperature=temperature, seed=3)
    return sample_codes(model, condition, row_ids=row_ids, draw=how, **settings)


@torch.no_grad()
def plain(model, rows=6, *, cfg_scale=1.0, cfg_interval=-1, **settings):
    """The algorithm without cache, buffers or parts: a whole forward for every code."""
    class_ids, row_ids = torch.arange(rows) % 5, torch.arange(50, 50 + rows)
    tokens, log_probs = torch.empty(rows, 0, dtype=torch.int64), []
    for position in range(16):
        hidden = model.hidden(tokens, class_ids)[:, -1]
        if cfg_scale != 1.0 and (cfg_interval < 0 or position - 1 <= cfg_interval):
            unconditional = model.hidden(tokens, torch.full_like(class_ids, 5))[:, -1]
            hidden = guide(torch.cat([hidden, unconditional]), cfg_scale)
        sample = sample_tokens(model.output(hidden), seed=3, row_ids=row_ids * 16 + position, **settings)
        tokens = torch.cat([tokens, sample.tokens], dim=1)
        log_probs.append(sample.log_probs[:, 0])
    return tokens, torch.stack(log_probs, dim=1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_engine_equals_a_whole_forward_for_every_code(model, settings):
    tokens, log_probs = plain(model, **settings)
    drawn = draw(model, **settings)
    assert torch.equal(drawn.tokens, tokens)
    torch.testing.assert_close(drawn.log_probs, log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_rows", [1, 4, 5, 6])
def test_parts_draw_what_the_whole_does(model, max_rows):
    whole, parts = draw(model), draw(model, max_rows=max_rows)
    assert torch.equal(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.log_probs, parts.log_probs)
    assert torch.equal(whole.kept_mass, parts.kept_mass)


@pytest.mark.parametrize(("total", "most", "expected"), [(6, 4, (3, 2)), (7, 3, (3, 3)), (5, 100, (5, 1))])
def test_parts_are_of_equal_size(total, most, expected):
    assert parts_of(total, most) == expected


class NoHostReads(TorchDispatchMode):
    """Fails where the host asks for a value or a shape that depends on values, which would wait for a GPU."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operation(*arguments, **(options or {}))


def test_a_step_is_the_same_work_on_the_same_memory(model):
    """What a CUDA graph needs: no buffer moves, and the host takes no part."""
    engine = CachedSampler(CachedForward(model), 3, draw=Draw(seed=1), cfg_scale=1.5, cfg_interval=2)

    def addresses():
        buffers = (*engine.cache, *engine.drawn, engine.row, engine.row_ids, engine.previous)
        return [buffer.data_ptr() for buffer in buffers]

    before = addresses()
    for first in (0, 10):
        engine.start(ClassCondition(torch.arange(3)), torch.arange(3) + first)
        with NoHostReads():
            for _ in range(15):
                engine.extend()
    assert addresses() == before
    assert engine.row.item() == 16


def test_cache_is_freed_with_the_call(model, monkeypatch):
    """At once, not when the garbage collector gets to it: the update needs the memory."""
    caches = []
    init_cache = model.init_cache

    def remembered(*arguments, **options):
        cache = init_cache(*arguments, **options)
        caches.extend(weakref.ref(tensor) for tensor in cache)
        return cache

    monkeypatch.setattr(model, "init_cache", remembered)
    replay_on_a_cpu(monkeypatch)
    gc.disable()
    try:
        draw(model, max_rows=3)
        assert caches
        assert all(cache() is None for cache in caches)
    finally:
        gc.enable()


def replay_on_a_cpu(monkeypatch):
    """As on a GPU; captures fail for want of one, unless the test captures in its own way."""
    create = CachedSampler.__init__

    def with_replay(engine, *arguments, **settings):
        create(engine, *arguments, **settings)
        engine.replay = Replay()

    monkeypatch.setattr(cached_sampler.CachedSampler, "__init__", with_replay)


def test_a_step_is_run_then_captured_then_replayed(monkeypatch):
    log = []

    def capture(function):
        log.append("capture")
        return lambda: log.append("replay")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    replay = Replay()
    for _ in range(4):
        replay(lambda: log.append("run"))
    assert log == ["run", "capture", "replay", "replay", "replay"]


def test_a_failed_capture_falls_back_with_one_line(model, monkeypatch, caplog):
    attempts = []

    def capture(function):
        attempts.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    expected = draw(model)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    replay_on_a_cpu(monkeypatch)
    cuda_graphs._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        drawn = draw(model, max_rows=3)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert len(attempts) == 1  # of one step, for both parts
    (record,) = caplog.records
    assert record.getMessage().endswith("without a CUDA graph: operation not permitted when stream is capturing")


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    """torch 2.11 leaves the stream of the capture current."""
    streams = ["mine"]

    class Graph:
        def __init__(self, graph, **options):
            pass

        def __enter__(self):
            streams.append("of the capture")

        def __exit__(self, *error):
            raise RuntimeError("capture ended")

    for name, value in {
        "CUDAGraph": object,
        "graph": Graph,
        "current_stream": lambda: streams[-1],
        "set_stream": streams.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="capture ended"):
        cuda_graphs.capture(lambda: None)
    assert streams[-1] == "mine"


def engines_of(sampler, calls, monkeypatch):
    """The numbers of rows of the engines that calls of so many completions build."""
    built = []
    create = CachedSampler.__init__

    def counted(engine, forward, rows, **settings):
        built.append(rows)
        create(engine, forward, rows, **settings)

    monkeypatch.setattr(cached_sampler.CachedSampler, "__init__", counted)
    for rows in calls:
        condition, row_ids = ClassCondition(torch.arange(rows) % 5), torch.arange(50, 50 + rows)
        assert torch.equal(sampler(condition, row_ids=row_ids).tokens, draw(sampler.model, rows).tokens)
        built.pop()  # of the comparison
    monkeypatch.undo()
    return built


def test_an_engine_is_kept_while_it_is_small_and_fits_the_call(model, monkeypatch):
    """The graph of a kept one is of use as long as its weights are where they were."""
    sampler = CodeSampler(model, draw=Draw(seed=3))
    assert engines_of(sampler, [6, 6], monkeypatch) == [6, 6]  # a CPU keeps nothing
    monkeypatch.setattr(CodeSampler, "_memory_to_keep", lambda self: 1 << 30)
    assert engines_of(sampler, [6, 6, 4, 3, 6], monkeypatch) == [6, 3, 6]
    monkeypatch.setattr(CodeSampler, "_memory_to_keep", lambda self: 1 << 30)
    model.load_state_dict(GPT(model.config).state_dict())
    torch.nn.init.normal_(model.output.weight)
    assert engines_of(sampler, [6], monkeypatch) == []  # the same addresses
    monkeypatch.setattr(CodeSampler, "_memory_to_keep", lambda self: 1 << 30)
    model.output.weight.data = model.output.weight.data.clone()
    assert engines_of(sampler, [6], monkeypatch) == [6]


def test_memory_of_a_sequence_by_hand(model):
    """GPT-XXL at 384 pixels in bf16: 48 layers x 24 heads x 64 x 576 rows of keys and of values, 2 bytes each."""
    with torch.device("meta"):
        large = GPT(MODEL_SPECS["GPT-XXL"].config(image_size=384))
    cache = 2 * 48 * 24 * 64 * 576 * 2 + 4  # and the weight of the condition
    assert bytes_per_sequence(large, dtype=torch.bfloat16, guided=True) == 2 * cache + 8 * 16384
    engine = CachedSampler(CachedForward(model), 3, draw=Draw(), cfg_scale=2.0, cfg_interval=-1)
    held = sum(tensor.nbytes for tensor in engine.cache)
    assert 3 * (bytes_per_sequence(model, dtype=torch.float32, guided=True) - 8 * 64) == held
    assert rows_in_memory(model, guided=True) >= 10**6  # nothing is bounded on a CPU
