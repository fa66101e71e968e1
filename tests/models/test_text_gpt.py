"""The text-conditional GPT computes LlamaGen's numbers, whole and row by row, with the released weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from grpo.config import UserError
from grpo.kernels import Draw, Dropout
from grpo.models import GPT, ClassCondition, GPTConfig, TextCondition, get_family, load_gpt, read_weights, save_weights
from grpo.models.condition_rows import weigh_first
from grpo.rollout import cached_sampler, generate, sample_codes
from grpo.rollout.scoring import hidden_states

FIXTURES = Path(__file__).parents[1] / "fixtures" / "llamagen_t2i"
CONFIG = GPTConfig(**json.loads((FIXTURES / "config.json").read_text()))
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return load_gpt(FIXTURES / "gpt_t2i.pt", CONFIG)


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


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (119, torch.float32), (107, torch.bfloat16)])
def test_the_weight_of_the_first_row_is_exact(tokens, dtype):
    """Without scores the first of 200 rows gets n / (n + 199). A logarithm in bf16 would be off by up to 1.5 %."""
    queries, keys, values = torch.zeros(3, 1, 1, 200, 64, dtype=dtype)
    values[:, :, 0] = 1
    weighed = weigh_first(queries, keys, values, torch.tensor([tokens]))
    share = F.scaled_dot_product_attention(*weighed, scale=64**-0.5)[0, 0, 0, 0].item()
    assert share == pytest.approx(tokens / (tokens + 199), rel=3e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("length", [0, 15])
def test_sequences_of_one_text_share_its_rows(gpt, expected, texts, length, monkeypatch):
    """The same numbers and gradients as with rows of their own, from an embedding of each text."""
    seen, embed = [], gpt.cls_embedding.forward
    monkeypatch.setattr(gpt.cls_embedding, "forward", lambda texts: seen.append(texts.rows) or embed(texts))
    tokens = expected["tokens"].repeat_interleave(3, 0).flip(0)[:, :length]
    shared = texts.repeat_interleave(3).with_unconditional()
    outcomes = []
    for condition in (shared, replace(shared, group=1)):
        logits = gpt(tokens.repeat(2, 1), condition)
        outcomes.append((logits, *torch.autograd.grad(logits.square().sum(), [*gpt.parameters()], allow_unused=True)))
    assert seen == [8, 24]
    for ours, plain in zip(*outcomes, strict=True):
        assert (ours is None and plain is None) or (ours - plain).norm() <= 2e-6 * plain.norm()


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
    monkeypatch.setattr(cached_sampler, "PREFILL_ROWS", 3 * 120)
    assert torch.equal(shared.tokens, sample_codes(gpt, texts, **how).tokens)
    assert seen[-3:] == [3, 3, 2]


@torch.no_grad()
def test_what_was_drawn_scores_as_it_was_drawn(gpt, texts):
    """The cached rows and those of a whole forward, guided."""
    drawn = sample_codes(gpt, texts, draw=Draw(seed=1), cfg_scale=3.0, row_ids=torch.arange(8))
    hidden = hidden_states(gpt, drawn.tokens[:, :-1], texts.repeat_interleave(2), cfg_scale=3.0)
    log_probs = gpt.output(hidden).log_softmax(-1).gather(2, drawn.tokens[..., None])[..., 0]
    assert_close(drawn.log_probs, log_probs, **ROUNDING)


@torch.no_grad()
def test_dropout_of_whole_captions_takes_the_null_text(expected, texts):
    model, tokens = GPT(replace(CONFIG, class_dropout=0.5)), expected["tokens"][:, :-1]
    model.load_state_dict(read_weights(FIXTURES / "gpt_t2i.pt"))
    masks = Dropout(torch.arange(4), seed=0)
    dropped = masks.rows(0.5, place=0)
    assert 0 < dropped.sum() < 4
    wanted = torch.where(dropped[:, None, None], expected["logits_uncond"], expected["logits"])
    assert_close(model(tokens, texts, masks), wanted, **ROUNDING)


def test_only_tokens_and_weights_of_a_text_matter(gpt, expected, texts):
    """Nothing flows from padding: neither its features' values, nor its gradient."""
    features = torch.where(texts.mask[..., None], texts.features, 7.0).requires_grad_()
    logits = gpt(expected["tokens"][:, :-1], TextCondition(features, texts.mask))
    assert_close(logits, expected["logits"], **ROUNDING)
    logits.sum().backward()
    assert torch.equal(features.grad.any(2), texts.mask)


def test_own_weights_carry_their_sizes(gpt, tmp_path):
    weights = get_family("GPT-tiny").export(gpt.state_dict())
    save_weights(tmp_path / "gpt.safetensors", weights, config=gpt.config)
    loaded = load_gpt(tmp_path / "gpt.safetensors")
    assert loaded.config == gpt.config
    assert load_gpt(tmp_path / "gpt.safetensors", replace(CONFIG, num_classes=3)).config.num_classes == 3  # it has none
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


CLASSES = Path(__file__).parents[1] / "fixtures" / "llamagen" / "gpt_c2i.pt"


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (
            FIXTURES / "gpt_t2i.pt",
            {"caption_dim": 2048},
            "caption_dim 24, the recipe wants 2048; set model.caption_dim",
        ),
        (FIXTURES / "gpt_t2i.pt", {"cls_token_num": 77}, "the recipe wants 77; set model.cls_token_num = 120"),
        (
            FIXTURES / "gpt_t2i.pt",
            {"caption_dim": None, "cls_token_num": 1},
            "text-conditional GPT, the recipe wants a class-conditional one; set model.cls_token_num = 120 and "
            "model.caption_dim = 24",
        ),
        (CLASSES, {}, "class-conditional GPT, the recipe wants a text-conditional one; leave out model.caption_dim"),
    ],
)
def test_weights_for_another_condition_are_explained(path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_gpt(path, replace(CONFIG, **changes))
    assert len(caught.value.problems) == 1


def test_a_text_model_without_its_null_text_is_not_whole(gpt, tmp_path):
    weights = {name: weight for name, weight in gpt.state_dict().items() if not name.endswith("uncond_embedding")}
    torch.save({"model": weights}, tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"not complete: cls_embedding\.uncond_embedding is missing"):
        load_gpt(tmp_path / "gpt.pt", CONFIG)
