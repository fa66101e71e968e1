"""The decode engine: the same draws however the work is laid out, no memory kept, and a way out of a failed capture."""

import gc
import logging
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config import Rollout
from grpo.kernels import sample_tokens
from grpo.models import MODEL_SPECS
from grpo.rollout import AutoregressiveRollout, autoregressive, compiled_blocks, decode, decoder
from grpo.rollout.autoregressive import _parts, _rows_in_memory
from grpo.rollout.compiled_blocks import compilation_pays
from grpo.rollout.decoder import Decoder, Replay, bytes_per_row
from grpo.rollout.scoring import guide

SETTINGS = [{}, {"cfg_scale": 1.7}, {"cfg_scale": 2.0, "cfg_interval": 6}, {"top_k": 9, "temperature": 0.7}]


def draw(model, rows=6, **settings):
    return decode(model, torch.arange(rows) % 5, row_ids=torch.arange(50, 50 + rows), seed=3, **settings)


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
@pytest.mark.parametrize("segment", [4, 7, 128])
def test_engine_equals_a_whole_forward_for_every_code(model, settings, segment, monkeypatch):
    monkeypatch.setattr(autoregressive, "SEGMENT", segment)
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
    assert _parts(total, most) == expected


class NoHostReads(TorchDispatchMode):
    """Fails where the host asks for a value or a shape that depends on values, which would wait for a GPU."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operation(*arguments, **(options or {}))


def test_a_step_is_the_same_work_on_the_same_memory(model):
    """What a CUDA graph needs: no buffer moves, and the host takes no part."""
    engine = Decoder(model, 3, draw=partial(sample_tokens, seed=1), cfg_scale=1.5, cfg_interval=2)

    def addresses():
        buffers = (*engine.cache, *engine.drawn, engine.row, engine.row_ids, engine.previous)
        return [buffer.data_ptr() for buffer in buffers]

    before = addresses()
    for first in (0, 10):
        engine.start(torch.arange(3), torch.arange(3) + first)
        with NoHostReads():
            for _ in range(15):
                engine.step(16)
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
    monkeypatch.setattr(autoregressive, "_steps", partial(replayed_steps, autoregressive._steps))
    gc.disable()
    try:
        draw(model, max_rows=3)
        assert caches
        assert all(cache() is None for cache in caches)
    finally:
        gc.enable()


def replayed_steps(steps, engine):
    """As on a GPU, with captures that fail for want of one."""
    return [Replay(step, pool=(0, 0)) for step in steps(engine)]


def test_a_step_is_run_then_captured_then_replayed(monkeypatch):
    log = []

    def capture(function, pool):
        log.append("capture")
        return lambda: log.append("replay")

    monkeypatch.setattr(decoder, "capture", capture)
    step = Replay(lambda: log.append("run"), pool=(0, 0))
    for _ in range(4):
        step()
    assert log == ["run", "capture", "replay", "replay", "replay"]


def test_a_failed_capture_falls_back_with_one_line(model, monkeypatch, caplog):
    attempts = []

    def capture(function, pool):
        attempts.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    monkeypatch.setattr(decoder, "capture", capture)
    monkeypatch.setattr(autoregressive, "SEGMENT", 4)
    expected = draw(model)
    monkeypatch.setattr(autoregressive, "_steps", partial(replayed_steps, autoregressive._steps))
    decoder._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        drawn = draw(model)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert len(attempts) == 4
    (record,) = caplog.records
    assert record.getMessage().endswith("without a CUDA graph: operation not permitted when stream is capturing")


def test_memory_of_a_row_by_hand(model, monkeypatch):
    """GPT-XXL at 384 pixels in bf16: 48 layers x 24 heads x 64 x 576 rows of keys and of values, 2 bytes each."""
    config = MODEL_SPECS["GPT-XXL"].config(image_size=384)
    cache = 2 * 48 * 24 * 64 * 576 * 2
    assert bytes_per_row(config, dtype=torch.bfloat16, copies=2) == 2 * cache + 8 * 16384
    engine = Decoder(model, 3, draw=sample_tokens, cfg_scale=2.0, cfg_interval=-1)
    held = sum(tensor.nbytes for tensor in engine.cache)
    assert 3 * (bytes_per_row(model.config, dtype=torch.float32, copies=2) - 8 * 64) == held
    assert _rows_in_memory(model, guided=True) >= 10**6  # nothing is bounded on a CPU


def test_compiled_blocks_decode_the_same_and_only_there(model, batch, monkeypatch):
    """The codes are those of the plain blocks; a forward for training does not meet the compiled ones.

    Traced and made functional, but not turned into C++, which would take half a minute.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = Rollout(num_generations=2, mode="autoregressive", cfg_scale=1.5)
    plain, compiled = (
        AutoregressiveRollout(model, None, config, seed=7, impl="auto", compiled=compiled) for compiled in (False, True)
    )
    compiled_frames = torch._dynamo.utils.counters["frames"]
    before = compiled_frames["ok"]
    expected = plain(batch)
    assert compiled_frames["ok"] == before
    drawn = compiled(batch)
    assert compiled_frames["ok"] > before
    assert torch.equal(drawn.tokens, expected.tokens)
    torch.testing.assert_close(drawn.old_log_probs, expected.old_log_probs, rtol=1e-4, atol=1e-4)
    after = compiled_frames["ok"]
    model.hidden(drawn.context, drawn.class_ids).sum().backward()  # training is as it was
    assert compiled_frames["ok"] == after


def test_only_a_long_run_on_a_cpu_with_a_compiler_compiles(monkeypatch):
    monkeypatch.setattr(compiled_blocks.shutil, "which", lambda name: "found" if name == "clang++" else None)
    assert compilation_pays(torch.device("cpu"), compiled_blocks.STEPS_THAT_PAY)
    assert not compilation_pays(torch.device("cpu"), compiled_blocks.STEPS_THAT_PAY - 1)
    assert not compilation_pays(torch.device("cuda"), 10**9)
    monkeypatch.setattr(compiled_blocks.shutil, "which", lambda name: None)
    assert not compilation_pays(torch.device("cpu"), 10**9)
