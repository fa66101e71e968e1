"""The text-conditional GPT computes LlamaGen's numbers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from grpo.formats import read_weights
from grpo.kernels import Draw
from grpo.models import GPT, ClassCondition, GPTConfig, TextCondition
from grpo.rollout import generate, sample_codes

FIXTURES = Path(__file__).parents[1] / "fixtures" / "llamagen_t2i"
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def gpt() -> GPT:
    model = GPT(GPTConfig(**json.loads((FIXTURES / "config.json").read_text())))
    model.load_state_dict(read_weights(FIXTURES / "gpt_t2i.pt"))
    return model


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return torch.load(FIXTURES / "expected.pt", weights_only=True)


@pytest.fixture(scope="module")
def texts(expected) -> TextCondition:
    return TextCondition(expected["features"], expected["mask"])


@torch.no_grad()
def test_logits_and_cross_entropy(gpt, expected, texts):
    logits = gpt(expected["tokens"][:, :-1], texts)
    assert_close(logits, expected["logits"], **ROUNDING)
    losses = F.cross_entropy(logits.transpose(1, 2), expected["tokens"], reduction="none").mean(1)
    assert_close(losses[expected["valid"].bool()].mean(), expected["cross_entropy"], **ROUNDING)
    assert_close(gpt(expected["tokens"][:, :-1], texts.unconditional()), expected["logits_uncond"], **ROUNDING)


@pytest.mark.parametrize("length", [0, 1, 5])
@torch.no_grad()
def test_rows_see_only_what_was_before_them(gpt, expected, texts, length):
    assert_close(gpt(expected["tokens"][:, :length], texts), expected["logits"][:, : length + 1], **ROUNDING)


def text(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*shape), torch.ones(*shape[:2], dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        (TextCondition, text(2, 7, 24), r"takes text features \[R, 120, 24\]"),
        (TextCondition, text(2, 120, 8), r"\[R, 120, 24\], not \[2, 120, 8\]"),
        (TextCondition, (torch.zeros(2, 120, 24), torch.arange(240).view(2, 120) < 120), "text 1 has no token"),
        (TextCondition, (torch.zeros(2, 120, 24), torch.ones(2, 120)), r"\[2, 120\] bool"),
        (TextCondition, text(2, 24), r"\[R, P, C\]"),
        (ClassCondition, (torch.zeros(2, dtype=torch.int64),), "takes texts as its condition, not ClassCondition"),
    ],
)
def test_wrong_texts_are_refused(gpt, kind, tensors, message):
    with pytest.raises(ValueError, match=message):
        gpt(torch.zeros(2, 3, dtype=torch.int64), kind(*tensors))


@pytest.mark.parametrize(("scale", "interval"), [("1", -1), ("4", -1), ("7.5", 5)])
def test_greedy_codes(gpt, expected, texts, scale, interval):
    codes = generate(gpt, texts, cfg_scale=float(scale), cfg_interval=interval, top_k=1)
    assert torch.equal(codes, expected[f"greedy_cfg{scale}_interval{interval}"])


def test_completions_share_the_rows_of_their_text(gpt, texts, monkeypatch):
    """Whatever the parts: a text is embedded once for those of its completions that are drawn together."""
    seen, embed = [], gpt.cls_embedding.forward
    monkeypatch.setattr(gpt.cls_embedding, "forward", lambda texts: seen.append(texts.rows) or embed(texts))
    how = {"draw": Draw(seed=1), "cfg_scale": 2.0, "row_ids": torch.arange(12)}
    shared = sample_codes(gpt, texts, **how)
    assert seen == [8]  # of 24 sequences
    parts, single = sample_codes(gpt, texts, max_rows=5, **how), sample_codes(gpt, texts.repeat_interleave(3), **how)
    assert seen == [8, 4, 4, 4, 24]
    assert torch.equal(shared.tokens, parts.tokens)
    assert torch.equal(shared.tokens, single.tokens)
