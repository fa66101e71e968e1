"""The recipes of the jobs that draw images, measure them, or write weights anew."""

from collections.abc import Iterator
from typing import Self

from grpo.config.job_sections import (
    Convert,
    Evaluation,
    Output,
    Sampling,
)
from grpo.config.protocols import protocol_values
from grpo.config.recipe import Recipe, data_problems, required
from grpo.config.recipes import image_size_problems, model_problems
from grpo.config.sections import Data, Model, Parallel, Tokenizer
from grpo.config.text_sections import Text, idle_text_keys, text_problems


class DrawingRecipe(Recipe):
    """Base of the recipes that draw images from a trained generator."""

    model: Model = Model()
    text: Text = Text()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    parallel: Parallel = Parallel()

    def problems(self) -> Iterator[str]:
        model, tokenizer, class_ids = self.model, self.tokenizer, self.sampling.class_ids
        yield from model_problems(model)
        yield from text_problems(self.text, model)
        yield from self._prompt_problems()
        yield from required("model", model, "checkpoint")
        yield from required("tokenizer", tokenizer, "checkpoint")
        yield from image_size_problems("sampling.image_size", self.sampling.image_size, tokenizer)
        if model.new_classes:
            yield "model.new_classes must be 0: images are drawn by weights that have all their classes"
        if class_ids != "all" and not all(class_id < model.num_classes for class_id in class_ids):
            yield f"sampling.class_ids must be below model.num_classes = {model.num_classes}"

    def _prompt_problems(self) -> Iterator[str]:
        """Texts are asked for where the model reads them."""
        given = [key for key in ("prompt", "prompts") if getattr(self.sampling, key) is not None]
        if not self.model.is_text:
            yield from (f"sampling.{key} needs model.caption_dim: this model takes classes" for key in given)
        elif not given:
            yield "sampling.prompts or sampling.prompt is required: what the images show"
        elif self.text.encoder == "t5" and not (self.text.features or self.text.path):
            yield "text.path or text.features is required: what makes features of the prompts"

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        own = "text.llamagen_features text.llamagen_short_features text.short_share"
        return [
            *idle_text_keys(self.text, self.model),
            (self.model.is_text, own, "prompts are no captions of LlamaGen's lists"),
            (self.model.is_text, "sampling.class_ids", "the model reads texts"),
            (self.sampling.prompt is not None, "sampling.prompts", "sampling.prompt is drawn in their place"),
        ]


class GenerateRecipe(DrawingRecipe):
    """Images from a trained generator."""

    job = "generate"

    output: Output = Output()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not (self.output.grid or self.output.folder or self.output.npz):
            yield "nothing to write: set output.grid, output.folder or output.npz"
        layout = self.output.layout
        if layout != "plain" and not self.output.folder:
            yield f'output.folder is required with output.layout = "{layout}"'
        if layout != "plain" and not self.model.is_text:
            yield f'output.layout = "{layout}" is of images by prompts, and needs model.caption_dim'
        if layout == "dpg" and self.output.images_per_prompt != 4:
            yield f'output.images_per_prompt must be 4 with output.layout = "dpg", not {self.output.images_per_prompt}'
        if layout == "dpg" and self.sampling.batch_size % 4:
            yield f'sampling.batch_size = {self.sampling.batch_size} must be a multiple of 4 with output.layout = "dpg"'

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        is_plain = self.output.layout == "plain"
        return [
            *super()._idle_keys(),
            (is_plain, "output.images_per_prompt", 'output.layout is "plain"'),
            (not is_plain, "output.num_images", "each prompt has output.images_per_prompt images"),
        ]


class EvaluateRecipe(DrawingRecipe):
    """FID and its companions of a generator, or of a set of images."""

    job = "evaluate"

    data: Data = Data()
    evaluation: Evaluation = Evaluation()

    def explicit(self) -> Self:
        """The same recipe with what its protocol says of the keys that it leaves alone."""
        changes = {}
        for name, values in protocol_values(self.model, self.sampling, self.evaluation).items():
            section = getattr(self, name)
            left = {key: value for key, value in values.items() if key not in section.model_fields_set}
            changes[name] = section.model_copy(update=left)
        return self.model_copy(update=changes)

    def departures(self) -> list[str]:
        """A line for each key of an `explicit` recipe that is not as its protocol says."""
        return [
            f"{name}.{key} = {given!r}, not {value!r}"
            for name, values in protocol_values(self.model, self.sampling, self.evaluation).items()
            for key, value in values.items()
            if (given := getattr(getattr(self, name), key)) != value
        ]

    def problems(self) -> Iterator[str]:
        recipe = self.explicit()
        data, sampling, evaluation = recipe.data, recipe.sampling, recipe.evaluation
        if evaluation.scores is not None:
            if evaluation.json_path is None:
                yield "evaluation.json_path is required with evaluation.scores: where the scores are added"
            return
        if evaluation.images is None:
            yield from super().problems()
        if evaluation.protocol != "none":
            yield from self._protocol_problems()
        if evaluation.reference is None:
            yield from (f"{problem} unless evaluation.reference is set" for problem in data_problems(data))
            if not data.has_images or data.may_be_stream:
                yield f'data.name = "{data.name}" has no images with numbers: set evaluation.reference'
            if evaluation.images is None and data.image_size != (sampling.resize_to or sampling.image_size):
                key = "sampling.resize_to" if sampling.resize_to else "sampling.image_size"
                yield f"{key} must equal data.image_size = {data.image_size} of the reference images"
        judges = evaluation.feature_checkpoint, evaluation.inception_checkpoint, evaluation.reader_checkpoint
        if judges == (None, None, None):
            yield "evaluation.feature_checkpoint or evaluation.inception_checkpoint is required"
        if evaluation.reader_checkpoint and (evaluation.images is not None or not self.model.is_text):
            yield "evaluation.reader_checkpoint reads what prompts ask for: it needs images drawn by a model of texts"

    @property
    def asks_captions(self) -> bool:
        """Whether images are drawn by the captions of the reference images, in place of prompts that are given."""
        given = self.sampling.prompt is not None or self.sampling.prompts is not None
        return self.model.is_text and not given and self.evaluation.reference is None

    def _prompt_problems(self) -> Iterator[str]:
        yield from () if self.asks_captions and self.text.encoder == "words" else super()._prompt_problems()

    def _protocol_problems(self) -> Iterator[str]:
        """A protocol has a network and a reference of its own."""
        evaluation, key = self.evaluation, f'evaluation.protocol = "{self.evaluation.protocol}"'
        if evaluation.inception_checkpoint is None:
            yield f"{key} needs evaluation.inception_checkpoint"
        if evaluation.reference is None:
            yield f"{key} needs evaluation.reference, ADM's VIRTUAL_imagenet256_labeled.npz"
        knows_guidance = "cfg_scale" in protocol_values(self.model, self.sampling, evaluation).get("sampling", {})
        if evaluation.images is None and not knows_guidance and "cfg_scale" not in self.sampling.model_fields_set:
            yield f"{key} has no guidance for model.name = {self.model.name}: set sampling.cfg_scale"

    def missing_files(self) -> Iterator[str]:
        if self.evaluation.scores is not None:
            unread = tuple(f"{name}." for name in self.sections() if name != "evaluation")
            yield from (line for line in super().missing_files() if not line.startswith(unread))
            return
        unread = ("model.", "tokenizer.", "text.", "sampling.") if self.evaluation.images is not None else ()
        unread += ("data.",) if self.evaluation.reference is not None else ()
        yield from (line for line in super().missing_files() if not line.startswith(unread))

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        keys = ["model.checkpoint", "tokenizer.checkpoint", *(f"sampling.{key}" for key in Sampling.model_fields)]
        are_given = self.evaluation.images is not None
        others = " ".join(f"evaluation.{key}" for key in Evaluation.model_fields if key not in ("scores", "json_path"))
        return [
            *super()._idle_keys(),
            (self.evaluation.scores is not None, others, "evaluation.scores are read, no images are looked at"),
            (are_given, " ".join(keys), "evaluation.images are not drawn from a model"),
            (True, "data.classes", "reference images have classes of their own"),
            (True, "data.codes data.cache_codes", "reference images are looked at, not encoded"),
        ]


class ConvertRecipe(Recipe):
    """Weights from one layout into another."""

    job = "convert"

    convert: Convert = Convert()

    def problems(self) -> Iterator[str]:
        return required("convert", self.convert, "input", "output")
