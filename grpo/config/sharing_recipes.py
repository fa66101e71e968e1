"""The jobs that hand a trained generator on: a folder to share, and a page to try it."""

from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge, Le

from grpo.config.drawing_recipes import DrawingRecipe
from grpo.config.recipe import required
from grpo.config.types import NonNegativeInt, Section, Wanted, Written


class Share(Section):
    """A trained generator with its tokenizer and a model card in one folder, to load, to publish."""

    output: Annotated[str | None, Written(folder=True)] = None
    """Folder to write; it must be new or empty."""
    run: Annotated[str | None, Wanted("the folder of a run")] = None
    """Run whose recipe, judgements and result files the model card shows; `grpo share RUN` sets it."""
    title: str | None = None
    """Heading of the model card; none is the name of the folder."""
    license: str | None = None
    """Licence of the weights, by the Hub's name for it, such as apache-2.0; none leaves it to be set in the card."""
    base_model: str | None = None
    """Name on the Hub of the model that this one was trained from."""
    num_samples: Annotated[NonNegativeInt, Le(1024)] = 16
    """Images that are drawn for the card; 0 draws none. A model of texts needs sampling.prompts or sampling.prompt."""
    push: str | None = None
    """Repository on the Hugging Face Hub, NAME/REPOSITORY, to which the folder is uploaded; none uploads nothing."""
    private: bool = True
    """A repository that is made by `push` can be seen by its owner alone."""


class Demo(Section):
    """A page in the browser that draws with a trained generator."""

    host: str = "127.0.0.1"
    """Address that the page is served at; this one can be reached from this machine alone, 0.0.0.0 from any other."""
    port: Annotated[int, Ge(0), Le(65535)] = 7860
    """Port of the page; 0 takes one that is free."""


class HandingRecipe(DrawingRecipe):
    """Base of both: what is asked for comes later."""

    def _prompt_problems(self) -> Iterator[str]:
        if self.sampling.prompt is not None or self.sampling.prompts is not None:
            yield from super()._prompt_problems()


class ShareRecipe(HandingRecipe):
    """A folder with a generator, its tokenizer and a model card."""

    job = "share"

    share: Share = Share()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from required("share", self.share, "output")
        if self.share.push is not None and self.share.push.count("/") != 1:
            yield f"share.push = {self.share.push}: give NAME/REPOSITORY, such as me/digits"

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        return [*super()._idle_keys(), (self.share.push is None, "share.private", "share.push is none")]


class DemoRecipe(HandingRecipe):
    """A page to try a generator."""

    job = "demo"

    demo: Demo = Demo()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.model.is_text and self.text.encoder == "t5" and self.text.path is None:
            yield "text.path is required: the T5 that makes features of the prompts"

    def _idle_keys(self) -> list[tuple[bool, str, str]]:
        unused = "sampling.prompts sampling.prompt sampling.class_ids sampling.class_order"
        return [*super()._idle_keys(), (True, unused, "the page asks what to draw")]
