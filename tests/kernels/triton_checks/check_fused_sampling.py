"""Sampling with the fused blocks beside the plain model: the same codes. Run by `test_triton.py`."""

import json
from pathlib import Path

import pytest
import torch

from grpo.kernels import Draw
from grpo.models import GPT, ClassCondition, GPTConfig, TextCondition, family_of, load_gpt
from grpo.models.fused_gpt import FusedGPT
from grpo.rollout import CodeSampler, generate, sample_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] + [torch.float16] * torch.cuda.is_available()
CASES = [  # heads of 24, 12 and 48
    ({"n_head": 2}, {}),
    ({"n_head": 4, "n_kv_head": 2}, {"cfg_scale": 1.7}),
    ({"n_head": 1}, {"cfg_scale": 2.0, "cfg_interval": 1}),
]


def build(dtype=torch.float32, block_size=4, **heads):
    """2 layers x 48; the output layer is made peaked so that codes matter."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=48, n_layer=2, vocab_size=40, block_size=block_size, num_classes=5, **heads)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    return model.requires_grad_(False).to(DEVICE, dtype)


def draw(model, impl, rows=2, **settings):
    class_ids, row_ids = torch.arange(rows, device=DEVICE) % 5, torch.arange(50, 50 + rows, device=DEVICE)
    how = Draw(seed=3, impl=impl)
    return sample_codes(model, ClassCondition(class_ids), row_ids=row_ids, draw=how, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "settings"), CASES, ids=str)
def check_codes_equal_the_plain_models(heads, settings, dtype):
    model = build(dtype, **heads)
    plain, fused = draw(model, "reference", **settings), draw(model, "triton", **settings)
    assert torch.equal(fused.tokens, plain.tokens)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fused.log_probs, plain.log_probs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("few_rows", [0, 6])
def check_codes_after_a_text(few_rows, monkeypatch):
    """Two texts, the second padded, one and three completions of each."""
    monkeypatch.setattr(FusedGPT, "few_rows", few_rows)
    model = build(n_head=2, cls_token_num=5, caption_dim=7)
    mask = torch.tensor([[True] * 5, [False] * 3 + [True] * 2], device=DEVICE)
    texts = TextCondition(torch.randn(2, 5, 7, device=DEVICE), mask)
    for rows, settings in ((2, {"cfg_scale": 1.0}), (6, {"cfg_scale": 2.0, "cfg_interval": 1})):
        asked = {"row_ids": torch.arange(rows, device=DEVICE), **settings}
        plain, fused = (sample_codes(model, texts, draw=Draw(impl=impl), **asked) for impl in ("reference", "triton"))
        assert torch.equal(fused.tokens, plain.tokens)
        torch.testing.assert_close(fused.log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter a minute each")
@pytest.mark.parametrize(("scale", "interval"), [("1", -1), ("4", -1), ("7.5", 5)])
def check_greedy_codes_after_texts_equal_llamagens(scale, interval):
    folder = Path(__file__).parents[2] / "fixtures" / "llamagen_t2i"
    model = load_gpt(folder / "gpt_t2i.pt", GPTConfig(**json.loads((folder / "config.json").read_text()))).to(DEVICE)
    expected = torch.load(folder / "expected.pt", map_location=DEVICE, weights_only=True)
    texts = TextCondition(expected["features"], expected["mask"]).select(slice(0, 2))
    guidance = {"cfg_scale": float(scale), "cfg_interval": interval}
    codes = generate(model.requires_grad_(False), texts, top_k=1, impl="triton", **guidance)
    assert torch.equal(codes, expected[f"greedy_cfg{scale}_interval{interval}"][:2])


@pytest.mark.parametrize(("copies", "few_rows"), [(True, 0), (False, 2)])
def check_hidden_states_over_several_splits(copies, few_rows, monkeypatch):
    """Heads of 48 are split every 128 rows. By the library's products, with a copy of the weights, and by ours."""
    monkeypatch.setattr(FusedGPT, "few_rows", few_rows)
    model = build(block_size=256, n_head=1)
    condition, tokens = ClassCondition(torch.arange(2, device=DEVICE)), torch.arange(512, device=DEVICE) % 37
    tokens, expected = tokens.view(2, 256), model.hidden(tokens.view(2, 256)[:, :-1], condition)
    fused = FusedGPT(model, copies=copies, impl="triton")
    cache = model.init_cache(2, dtype=torch.float32, device=DEVICE)
    rows = {0: fused.prefill(condition, cache)}
    # Keys and values of the rows between, from the plain model.
    for position in range(1, 256):
        forward = fused if position in (1, 127, 128, 255) else model
        rows[position] = forward.extend(tokens[:, position - 1], torch.tensor(position, device=DEVICE), cache)
    for position, row in rows.items():
        torch.testing.assert_close(row, expected[:, position], rtol=1e-4, atol=1e-5)


def check_copies_are_refreshed_in_place():
    """A kept engine draws with the weights of the day: the model's, wherever they are."""
    model = build(block_size=4, n_head=2)
    forward = family_of(model).cached_forward(model, impl="triton", copies=True)
    before = [weight.data_ptr() for weight in forward.weights]
    sampler = CodeSampler(model, draw=Draw(seed=3, impl="triton"))
    sampler._memory_to_keep = lambda: 1 << 30
    condition, row_ids = ClassCondition(torch.arange(2, device=DEVICE)), torch.arange(50, 52, device=DEVICE)
    first = sampler(condition, row_ids=row_ids).tokens
    kept = sampler._kept
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 5
    second = sampler(condition, row_ids=row_ids).tokens
    assert sampler._kept is kept
    assert torch.equal(second, draw(model, "reference").tokens)
    assert not torch.equal(first, second)
    forward.refresh()
    assert before == [weight.data_ptr() for weight in forward.weights]
    for mine, theirs in zip(forward.blocks[1], FusedGPT(model, copies=False).blocks[1], strict=True):
        assert torch.equal(mine, theirs)
