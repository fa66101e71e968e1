"""What `evaluation.protocol` makes of a recipe."""

import pytest

from grpo.config import EvaluateRecipe, UserError, load_recipe

BASE = (
    *("--model.checkpoint", "gpt.pt", "--tokenizer.checkpoint", "vq.pt", "--evaluation.protocol", "llamagen"),
    *("--evaluation.inception_checkpoint", "inception.pth", "--evaluation.reference", "reference.npz"),
)


def recipe(*flags):
    return load_recipe(EvaluateRecipe, [*BASE, *flags])


@pytest.mark.parametrize(("name", "size", "guidance"), [("GPT-B", 256, 2.0), ("GPT-XXL", 384, 1.75)])
def test_the_published_settings(name, size, guidance):
    explicit = recipe("--model.name", name, "--sampling.image_size", str(size)).explicit()
    sampling = explicit.sampling
    assert (sampling.cfg_scale, sampling.temperature, sampling.top_k, sampling.top_p) == (guidance, 1, 0, 1)
    assert (sampling.class_order, sampling.class_ids) == ("random", "all")
    assert (sampling.resize_to, sampling.resize_filter) == (None if size == 256 else 256, "bicubic")
    assert explicit.evaluation.num_images == 50_000
    assert explicit.departures() == []
    assert explicit.explicit() == explicit


def test_what_the_recipe_says_stays_and_is_told():
    explicit = recipe("--model.name", "GPT-L", "--sampling.cfg_scale", "1", "--evaluation.num_images", "64").explicit()
    assert explicit.sampling.cfg_scale == 1
    assert explicit.departures() == ["evaluation.num_images = 64, not 50000", "sampling.cfg_scale = 1.0, not 2.0"]


def test_given_images_are_only_measured_by_it():
    explicit = recipe("--evaluation.images", "samples.npz").explicit()
    assert explicit.sampling.class_order == "in_turn"
    assert explicit.departures() == []


def test_without_a_protocol_nothing_is_set():
    plain = load_recipe(EvaluateRecipe, [*BASE[:4], *BASE[6:]])
    assert plain.explicit() == plain


def test_what_it_needs():
    with pytest.raises(UserError) as caught:
        load_recipe(EvaluateRecipe, [*BASE[:6], "--model.name", "GPT-tiny", "--data.name", "synthetic"])
    told = "\n".join(caught.value.problems)
    assert "needs evaluation.inception_checkpoint" in told
    assert "needs evaluation.reference" in told
    assert "no guidance for model.name = GPT-tiny: set sampling.cfg_scale" in told
