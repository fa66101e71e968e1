"""The recipes of the networks that judge or reward."""

from collections.abc import Iterator

from grpo.config.job_sections import Classifier, Reader
from grpo.config.recipe import TrainingRecipe
from grpo.config.sections import Data


class ClassifierRecipe(TrainingRecipe):
    """Training of a small classifier, to reward or to judge."""

    job = "classifier"

    classifier: Classifier = Classifier()

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        return [*super()._idle_keys(), (True, "data.codes data.cache_codes", "a classifier is trained on images")]


class ReaderRecipe(TrainingRecipe):
    """Training of a network that reads drawings of shapes, to judge or to reward."""

    job = "reader"

    reader: Reader = Reader()
    data: Data = Data(name="shapes", split="reader", image_size=32)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.data.name != "shapes":
            yield f'data.name must be "shapes", whose scenes are known, not "{self.data.name}"'

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        return [*super()._idle_keys(), (True, "data.codes data.cache_codes", "a reader is trained on images")]
