"""The recipes of the jobs that tune a generator without rewards."""

from collections.abc import Iterator

from grpo.config.job_sections import Distill, Finetune
from grpo.config.recipes import GeneratorRecipe, PretrainRecipe


class DistillRecipe(GeneratorRecipe):
    """Distillation of a generator's guidance and temperature into one forward, on the student's own samples."""

    job = "distill"

    distill: Distill = Distill()

    def frozen_generators(self) -> set[str | None]:
        return {self.distill.teacher_checkpoint or self.model.checkpoint}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from _tuned_problems(self)

    def image_uses(self) -> Iterator[str]:
        """None: contexts are the student's own."""
        return iter(())

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        dropouts = "model.dropout model.class_dropout data.cache_codes data.codes"
        return [*super()._idle_keys(), (True, dropouts, "the student draws its contexts and drops nothing of them")]


class FinetuneRecipe(PretrainRecipe):
    """Training of a generator on real images so that it needs no guidance: CCA or GFT."""

    job = "finetune"

    finetune: Finetune = Finetune()

    def frozen_generators(self) -> set[str | None]:
        if self.finetune.loss != "cca":
            return set()
        return {self.finetune.reference_checkpoint or self.model.checkpoint}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from _tuned_problems(self)
        if self.finetune.loss == "gft" and self.finetune.scale > 1:
            yield f'finetune.beta = {self.finetune.beta} must be at most 1 with finetune.loss = "gft"'
        if self.finetune.loss == "cca" and self.training.images < 2:
            yield 'training.batch_size must be at least 2 with finetune.loss = "cca": negatives are another image\'s'

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        of_cca = "finetune.negative_weight finetune.reference_checkpoint"
        return [*super()._idle_keys(), (self.finetune.loss != "cca", of_cca, 'finetune.loss is not "cca"')]


def _tuned_problems(recipe: GeneratorRecipe) -> Iterator[str]:
    """Jobs that improve a generator begin with one; only a trial of the machinery does without."""
    if recipe.model.checkpoint is None and recipe.data.name != "synthetic":
        yield "model.checkpoint is required: the weights to start from"
    if recipe.model.new_classes:
        yield f"model.new_classes must be 0 in `grpo {recipe.job}`: train their embeddings with `grpo pretrain` first"
