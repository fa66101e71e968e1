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


class DrawingRecipe(Recipe):
    """Base of the recipes that draw images from a trained generator."""

    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    sampling: Sampling = Sampling()
    parallel: Parallel = Parallel()

    def problems(self) -> Iterator[str]:
        model, tokenizer, class_ids = self.model, self.tokenizer, self.sampling.class_ids
        yield from model_problems(model)
        yield from required("model", model, "checkpoint")
        yield from required("tokenizer", tokenizer, "checkpoint")
        yield from image_size_problems("sampling.image_size", self.sampling.image_size, tokenizer)
        if model.new_classes:
            yield "model.new_classes must be 0: images are drawn by weights that have all their classes"
        if class_ids != "all" and not all(class_id < model.num_classes for class_id in class_ids):
            yield f"sampling.class_ids must be below model.num_classes = {model.num_classes}"


class GenerateRecipe(DrawingRecipe):
    """Images from a trained generator."""

    job = "generate"

    output: Output = Output()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not (self.output.grid or self.output.folder or self.output.npz):
            yield "nothing to write: set output.grid, output.folder or output.npz"


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
        if evaluation.feature_checkpoint is None and evaluation.inception_checkpoint is None:
            yield "evaluation.feature_checkpoint or evaluation.inception_checkpoint is required"

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
        unread = ("model.", "tokenizer.") if self.evaluation.images is not None else ()
        unread += ("data.",) if self.evaluation.reference is not None else ()
        yield from (line for line in super().missing_files() if not line.startswith(unread))

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        keys = ["model.checkpoint", "tokenizer.checkpoint", *(f"sampling.{key}" for key in Sampling.model_fields)]
        are_given = self.evaluation.images is not None
        return [
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
