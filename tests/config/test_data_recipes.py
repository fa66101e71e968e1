"""Combinations of data sets, codes on disk and jobs."""

import re

import pytest
from pydantic import ValidationError

from grpo.config import ClassifierRecipe, EncodeRecipe, GRPORecipe, PretrainRecipe, ReaderRecipe, TokenizerRecipe

TOKENIZER = {"tokenizer": {"checkpoint": "vq.pt"}}
STREAM = {"name": "stream", "path": "hf://datasets/a/b/*.parquet"}


@pytest.mark.parametrize(
    ("recipe_class", "recipe", "problem"),
    [
        (PretrainRecipe, {"data": {"name": "codes"}}, 'data.path is required with data.name = "codes"'),
        (PretrainRecipe, {"data": {**STREAM, "cache_codes": True}, **TOKENIZER}, "data.cache_codes needs a data set"),
        (PretrainRecipe, {"data": {**STREAM, "name": "imagenet", "codes": "c"}}, "data.codes needs a data set"),
        (GRPORecipe, {"data": {"name": "codes", "path": "c"}}, "tokenizer.checkpoint is required"),
        (GRPORecipe, {"data": {"name": "codes", "path": "c"}, **TOKENIZER}, "reward.reconstruction.weight must be 0"),
        (ReaderRecipe, {"data": {"name": "shapes", "image_size": 20}}, "data.image_size must be at least 24"),
        (TokenizerRecipe, {"data": {"name": "codes", "path": "c"}}, 'data.name = "codes" has no images'),
        (ClassifierRecipe, {"data": {"name": "codes", "path": "c"}}, 'data.name = "codes" has no images'),
        (EncodeRecipe, {"data": {"path": "x"}, **TOKENIZER}, "encode.output is required"),
        (EncodeRecipe, {"data": {"path": "x"}, "encode": {"output": "c"}}, "tokenizer.checkpoint is required"),
        (EncodeRecipe, {"data": STREAM, "encode": {"output": "c"}, **TOKENIZER}, "data.path must be of files here"),
        (EncodeRecipe, {"data": {"name": "classes"}, "encode": {"output": "c"}, **TOKENIZER}, "no images to encode"),
        (
            EncodeRecipe,
            {"data": {"path": "x", "image_size": 200}, "encode": {"output": "c"}, **TOKENIZER},
            "data.image_size = 200 must be a multiple",
        ),
    ],
)
def test_impossible_uses_of_codes_and_streams(recipe_class, recipe, problem) -> None:
    if recipe_class is GRPORecipe:
        recipe = {**recipe, "reward": {"reconstruction": {"kind": "reconstruction"}}}
    with pytest.raises(ValidationError, match=re.escape(problem)):
        recipe_class.model_validate(recipe)


def test_recipes_on_codes_need_no_tokenizer_and_no_images() -> None:
    alone = PretrainRecipe.model_validate({"data": {"name": "codes", "path": "c"}})
    assert not alone.needs_tokenizer
    assert alone.notes() == []
    beside = {"data": {"name": "folder", "path": "x", "codes": "c", "cache_codes": True, "shuffle_window": 5}}
    notes = PretrainRecipe.model_validate(beside).notes()
    assert [note.split()[0] for note in notes] == ["data.cache_codes", "data.shuffle_window"]
    rewards = {"jpeg_size": False, "reconstruction": True}
    for kind, reads in rewards.items():
        recipe = {"data": {"path": "x", "codes": "c"}, "reward": {kind: {"kind": kind}}, **TOKENIZER}
        assert GRPORecipe.model_validate(recipe).reads_images is reads
