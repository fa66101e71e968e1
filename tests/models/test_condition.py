"""Conditions: rows, their unconditional counterparts, and what a family of models does with them."""

import pytest
import torch

from grpo.config import Model, Tokenizer, UserError
from grpo.models import (
    ClassCondition,
    TextCondition,
    as_condition,
    build_tokenizer,
    generator_sizes,
    get_family,
    get_tokenizer_spec,
    tokenizer_sizes,
)

ROWS = ClassCondition(torch.tensor([4, 0, 2]))


def test_rows_are_chosen_and_repeated():
    assert ROWS.rows == 3
    assert ROWS.select(slice(1, None)).class_ids.tolist() == [0, 2]
    assert ROWS.select(torch.tensor([2, 2])).class_ids.tolist() == [2, 2]
    assert ROWS.repeat_interleave(2).class_ids.tolist() == [4, 4, 0, 0, 2, 2]
    assert ROWS.padded(5).class_ids.tolist() == [4, 0, 2, 4, 0]
    assert as_condition(ROWS) is ROWS
    assert as_condition(ROWS.class_ids).class_ids is ROWS.class_ids


def test_dropped_rows_stay_dropped():
    some = ROWS.drop(torch.tensor([True, False, False])).drop(torch.tensor([False, False, True]))
    assert some.dropped.tolist() == [True, False, True]
    assert some.unconditional().dropped.tolist() == [True, True, True]
    both = some.with_unconditional()
    assert both.class_ids.tolist() == [4, 0, 2, 4, 0, 2]
    assert both.dropped.tolist() == [True, False, True, True, True, True]
    assert both.select(slice(1, 2)).dropped.tolist() == [False]


def test_groups_of_equal_rows_are_known_as_far_as_they_last():
    rows = ROWS.repeat_interleave(2).repeat_interleave(2)  # 3 groups of 4
    assert (ROWS.group, rows.group, rows.one_of_each_group().class_ids.tolist()) == (1, 4, [4, 0, 2])
    assert rows.with_unconditional().group == rows.unconditional().group == rows.to("cpu").group == 4
    for part, group in ((slice(0, 8), 4), (slice(4, 6), 2), (slice(2, 8), 2), (slice(10, None), 2), (slice(3, 9), 1)):
        chosen = rows.select(part)
        assert chosen.group == group
        assert torch.equal(chosen.one_of_each_group().repeat_interleave(group).class_ids, chosen.class_ids)
    assert rows.drop(torch.arange(12) == 1).group == rows.map(lambda x: x.roll(1)).group == 1
    assert rows.select(torch.arange(12)).group == rows.select(slice(None, None, 2)).group == 1
    assert rows.joined(ROWS.repeat_interleave(2)).group == 2


def test_texts_are_chosen_repeated_and_compared():
    mask = torch.tensor([[False, True, True], [True, True, True]])
    texts = TextCondition(torch.arange(24.0).view(2, 3, 4), mask)
    assert texts.repeat_interleave(2).mask.tolist() == mask[[0, 0, 1, 1]].tolist()
    both = texts.with_unconditional().select(slice(1, 3))
    assert both.dropped.tolist() == [False, True]
    assert torch.equal(both.features, texts.features[[1, 0]])
    other = TextCondition(texts.features.clone().index_fill_(0, torch.tensor([1]), 0.0), mask)
    assert texts.equal_rows(other).tolist() == [True, False]
    assert texts.joined(other).rows == 4


def test_a_family_is_found_by_the_name_of_a_spec(tmp_path):
    family = get_family("GPT-tiny")
    model, tokenizer = Model(name="GPT-tiny", num_classes=3), Tokenizer(codebook_size=12, downsample_size=4)
    config = generator_sizes(model, tokenizer, image_size=16)
    assert (config.dim, config.block_size, config.vocab_size, config.num_classes) == (64, 16, 12, 3)
    built = family.build(config)
    weights = family.export(built.state_dict())
    torch.save(weights, tmp_path / "gpt.pt")
    loaded = family.load(tmp_path / "gpt.pt", config, bare=True)
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    assert {name for name in built.forward_methods if callable(getattr(built, name))} == {"hidden", "prefill", "extend"}
    with pytest.raises(UserError, match=r"model\.name: there is no 'GPT-small'"):
        get_family("GPT-small")


def test_the_tokenizer_of_a_recipe():
    section = Tokenizer(name="VQ-tiny", codebook_size=12, downsample_size=4)
    assert tokenizer_sizes(section) == get_tokenizer_spec("VQ-tiny").config(codebook_size=12)
    models = [build_tokenizer(section, device=torch.device("cpu"), seed=seed) for seed in (1, 1, 2)]
    first, same, other = (model.quantize.embedding.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    assert not models[0].training
    with pytest.raises(UserError, match="VQ-tiny has 4 pixels a code, not 16; set it to 4"):
        tokenizer_sizes(section.model_copy(update={"downsample_size": 16}))
