"""The recipe of the job that encodes texts."""

from collections.abc import Iterator

from grpo.config.recipe import Recipe, data_problems, required
from grpo.config.sections import Data, Parallel
from grpo.config.text_sections import EncodeText, Text


class EncodeTextRecipe(Recipe):
    """Features of all texts of a data set, by a T5 encoder, computed once."""

    job = "encode-text"

    text: Text = Text()
    data: Data = Data()
    encode_text: EncodeText = EncodeText()
    parallel: Parallel = Parallel()

    def problems(self) -> Iterator[str]:
        yield from required("encode_text", self.encode_text, "output")
        yield from required("text", self.text, "path")
        yield from data_problems(self.data)
        if self.text.encoder != "t5":
            yield f'text.encoder = "{self.text.encoder}" needs no features on disk'
        if self.data.name in ("classes", "codes", "folder"):
            yield f'data.name = "{self.data.name}" has no texts to encode'
        if self.data.may_be_stream:
            yield "data.path must be of files here: a stream's texts are not known beforehand"

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        others = "features llamagen_features llamagen_short_features short_share"
        return [
            (True, " ".join(f"text.{key}" for key in others.split()), "features are computed"),
            (True, "data.class_map data.classes data.codes data.cache_codes data.image_size", "texts alone are read"),
        ]
