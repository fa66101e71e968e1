"""Words as random vectors: the same everywhere, told apart by word and by place."""

import hashlib

import pytest
import torch

from grpo.config import UserError
from grpo.texts import WordEncoder


def test_vectors_are_fixed_and_nearly_normal():
    """The digest pins them: other numbers would be another encoder for every model trained so far."""
    (vectors,) = WordEncoder(rows=9, width=4096).features(["Red circle red"])
    assert vectors.shape == (3, 4096)
    assert vectors.mean(1).abs().max() < 0.05
    assert (vectors.std(1) - 1).abs().max() < 0.05
    correlations = (vectors @ vectors.T / 4096).fill_diagonal_(0)
    assert correlations[0, 2].item() == pytest.approx(0.5, abs=0.05)  # "red" at two places shares the word's own part
    assert correlations[1].abs().max() < 0.05
    halves = (vectors * 4).to(torch.int8)
    assert torch.equal(halves.float() / 4, vectors)
    assert hashlib.sha256(halves.numpy().tobytes()).hexdigest()[:16] == "039f2cd6f6c9a724"


def test_what_a_mean_over_the_words_tells():
    """A LlamaGen model sees a mean over the text, in which the order of the words must still show."""
    encoder = WordEncoder(rows=12, width=64)
    condition = encoder(["a red dot left of a blue square", "a blue square left of a red dot"])
    means = condition.features.sum(1) / condition.mask.sum(1, keepdim=True)
    assert (means[0] - means[1]).norm() > 1


def test_case_and_punctuation_do_not_count_and_what_is_over_is_cut():
    encoder = WordEncoder(rows=3, width=8)
    condition = encoder(["A red, DOT!", "a red dot", " ".join(["word"] * 10_000)])
    assert torch.equal(condition.features[0], condition.features[1])
    assert condition.mask.sum(1).tolist() == [3, 3, 3]
    with pytest.raises(UserError, match="finds no word in '!!!': change the text"):
        encoder(["!!!"])


def test_the_same_prompt_may_come_twice():
    condition = WordEncoder(rows=4, width=8)(["one dot", "two dots", "one dot"])
    assert torch.equal(condition.features[0], condition.features[2])
    assert not torch.equal(condition.features[0], condition.features[1])
