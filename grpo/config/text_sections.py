"""The sections of text-conditional models: where the features of a text come from, and their encoding to disk."""

from collections.abc import Iterator
from typing import Annotated, Literal

from grpo.config.sections import Data, Model
from grpo.config.types import Fraction, MayChange, PositiveInt, Section, Wanted


class Text(Section):
    """From a text to what a text-conditional model sees: a row of features for each of its tokens."""

    encoder: Literal["t5", "words"] = "t5"
    """t5: features of a T5 encoder, from `features`, LlamaGen's files, or, to draw images, from the encoder at `path`.
    words: needs no weights: a word at its place in the text is a fixed random vector, for small worlds and trials."""
    features: Annotated[str | None, Wanted("the features that `grpo encode-text` wrote"), MayChange] = None
    """Folder of the features of all texts, as `grpo encode-text` writes it."""
    path: Annotated[str | None, Wanted("a folder of transformers' T5, such as flan-t5-xl"), MayChange] = None
    """Folder of a T5 as transformers saves it: config.json, the tokenizer, the weights. `grpo encode-text` needs it,
    and drawing images of texts that are not in `features`."""
    llamagen_features: Annotated[str | None, Wanted("LlamaGen's T5 features, LIST/NUMBER.npy"), MayChange] = None
    """Folder of LlamaGen's features of the captions of its own lists (`data.path` with LIST.jsonl): [1, L, C] each."""
    llamagen_short_features: Annotated[str | None, Wanted("LlamaGen's T5 features of short captions"), MayChange] = None
    """The same of the captions cut at their first full stop."""
    short_share: Fraction = 0.3
    """Share of the samples that see the short caption, where llamagen_short_features are there."""


class EncodeText(Section):
    """Features of texts, on disk."""

    output: str | None = None
    """Folder for the features: a new one, or one that has features by the same encoder, to which others are added."""
    max_tokens: PositiveInt = 120
    """Tokens of a text that the encoder sees; the rest is cut. LlamaGen's models have 120."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the encoder and of the features on disk. LlamaGen's features were computed in bf16."""
    batch_size: PositiveInt = 64
    """Texts that are encoded together on each rank."""
    shard_size: PositiveInt = 4096
    """Texts in one file. A rank that is killed loses the one it was at."""


def text_problems(text: Text, model: Model, data: Data | None = None, *, judge: bool = False) -> Iterator[str]:
    """What cannot go together where a generator is to read texts; `data` are None where none are trained on."""
    if not model.is_text:
        if model.cls_token_num != 1:
            yield "model.cls_token_num above 1 needs model.caption_dim, the width of the features: 2048 for flan-t5-xl"
        return
    if model.new_classes:
        yield "model.new_classes must be 0 with model.caption_dim: a text-conditional model has no classes"
    if text.llamagen_short_features and not text.llamagen_features:
        yield "text.llamagen_short_features needs text.llamagen_features"
    if text.features and text.llamagen_features:
        yield "text.features and text.llamagen_features: give one of them"
    if data is None:
        return
    if text.encoder == "t5" and not (text.features or text.llamagen_features):
        yield 'text.features is required with text.encoder = "t5" (`grpo encode-text` makes them), or llamagen_features'
    if judge and data.may_be_stream:
        yield "judge.interval must be 0: captions of a stream cannot be picked"
    if data.name in ("classes", "codes"):
        yield f'data.name = "{data.name}" has no texts: model.caption_dim is that of a model that reads them'


def idle_text_keys(text: Text, model: Model) -> list[tuple[bool, str, str]]:
    """As `Recipe._idle_keys`."""
    by_words = text.encoder == "words"
    all_keys = " ".join(f"text.{key}" for key in Text.model_fields)
    files = "text.features text.path text.llamagen_features text.llamagen_short_features"
    return [
        (not model.is_text, all_keys, "the model takes classes (model.caption_dim is none)"),
        (model.is_text, "model.num_classes", "the model reads texts"),
        (model.is_text and by_words, files, 'text.encoder is "words"'),
        (model.is_text and not text.llamagen_short_features, "text.short_share", "there are no short captions"),
    ]
