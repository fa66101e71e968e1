"""A trained generator as one object: classes or prompts in, pictures out; from a folder, into a folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from PIL import Image
from torch import nn

from grpo.config import (
    EXPORT_NAME,
    SHARED_RECIPE,
    SHARED_TOKENIZER,
    DemoRecipe,
    Model,
    Sampling,
    Share,
    Text,
    UserError,
    did_you_mean,
    load_recipe,
    of_run,
    read_bytes,
    reading,
    shorten,
    writing,
)
from grpo.config.drawing_recipes import DrawingRecipe
from grpo.config.types import Precision
from grpo.data import to_image
from grpo.evaluation import classes_in_turn
from grpo.formats import save_weights
from grpo.models import (
    Condition,
    Generator,
    VQModel,
    build_tokenizer,
    default_names,
    family_named,
    family_of,
    generator_sizes,
    learned_classes,
    load_generator,
    load_vq,
)
from grpo.rollout import place_sampler
from grpo.sharing.card import model_card
from grpo.sharing.config_file import (
    CONFIG_NAME,
    TextFeatures,
    describe,
    read,
    require_sizes,
    sampling_of,
)
from grpo.texts import TextEncoder, build_encoder, clean_text

CARD_NAME, SAMPLES_NAME = "README.md", "samples.png"
COMPANIONS = (CARD_NAME, SAMPLES_NAME, SHARED_RECIPE)
"""Files that go with the weights and that nothing depends on."""
FILES = (EXPORT_NAME, SHARED_TOKENIZER, CONFIG_NAME, *COMPANIONS)
LARGEST_COMPANION = 2**26  # bytes


EXACT = Sampling(mixed_precision="fp32")


class ImageGenerator(ModelHubMixin, library_name="autoregressive-grpo"):
    """A generator with the tokenizer that decodes its codes and, if it reads texts, what encodes them.

        generator = ImageGenerator.from_pretrained("digits")
        images = generator(classes=[3, 7], num_images=8, seed=0)

    `save_pretrained(folder)` and `push_to_hub("me/digits")` are those of huggingface_hub's `ModelHubMixin`. Weights are
    saved in the precision that they have here.

    Args:
        model: a generator of any family, such as `load_gpt` returns. It is brought to the device, and frozen.
        tokenizer: its tokenizer.
        sampling: how images are drawn where a call does not say it; precision and kernels are always these.
        encoder: of the texts of a text-conditional model; without one it cannot be asked for images.
        text: what the encoder has to be, where there is none.
        device: None is a GPU where there is one.
        files: content by name of those `COMPANIONS` that go into the folder, such as the model card README.md.

    Raises:
        UserError: the tokenizer has another number of codes, or the encoder another width of features.
    """

    def __init__(
        self,
        model: Generator,
        tokenizer: VQModel,
        *,
        sampling: Sampling = EXACT,
        encoder: TextEncoder | None = None,
        text: TextFeatures | None = None,
        device: torch.device | str | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        sizes: Any = model.config
        codes = tokenizer.config.codebook_size
        if sizes.vocab_size != codes:
            raise UserError(f"the generator draws {sizes.vocab_size} codes, the tokenizer has {codes}: not a pair")
        if encoder is not None and text is None:
            text = TextFeatures.model_validate(encoder.identity)
        if text is not None and text.width != sizes.caption_dim:
            raise UserError(
                f"the texts' features have width {text.width}, the generator takes {sizes.caption_dim}: not a pair"
            )
        self.device = _device(device)
        sampler = place_sampler(model, tokenizer, sampling, device=self.device)
        self.model, self.tokenizer, self.sampling, self._sizes = sampler.model, sampler.tokenizer, sampling, sizes
        self.encoder, self.text, self.files = encoder, text, dict(files)

    def __call__(
        self,
        classes: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        *,
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scale: float | None = None,
        cfg_interval: int | None = None,
    ) -> list[Image.Image]:
        """Pictures of classes, or of prompts, in turn; the same as `grpo generate` draws by the same settings.

        Args:
            classes: class ids, or their names; None is all classes.
            prompts: texts, for a text-conditional model.
            num_images: how many in all; None is one of each.
            batch_size: pictures drawn together.

        The others are the keys of the section [sampling]; None is what the generator was made with.

        Raises:
            UserError: no such class, a text without features, or settings that cannot be.
        """
        given = {
            "seed": seed, "batch_size": batch_size, "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "cfg_scale": cfg_scale, "cfg_interval": cfg_interval,
        }  # fmt: skip
        given = {key: value for key, value in given.items() if value is not None}
        sampling = sampling_of(self.sampling, given, where="")
        condition = self._condition(classes, prompts, num_images)
        sampler = place_sampler(self.model, self.tokenizer, sampling, device=self.device)
        return [to_image(pixels) for pixels in sampler(condition, torch.arange(condition.rows))]

    @property
    def reads_texts(self) -> bool:
        """Whether it is asked by prompts, and not by classes."""
        return self._sizes.caption_dim is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class id; none where it reads texts."""
        sizes = self._sizes
        return () if self.reads_texts else sizes.class_names or default_names(sizes.num_classes)

    def class_id(self, asked: int | str) -> int:
        """The id of a class that is given by it or by its name. Raises a UserError: there is none, or several."""
        names = self.class_names
        if isinstance(asked, int) and not isinstance(asked, bool):
            if not 0 <= asked < len(names):
                raise UserError(f"there is no class {asked}: class ids are 0 to {len(names) - 1}")
            return asked
        found = [number for number, name in enumerate(names) if name == asked]
        if len(found) != 1:
            others = f"give one of {', '.join(map(str, found))}" if found else did_you_mean(str(asked), names)
            raise UserError(f"class {asked}: {'several have' if found else 'none has'} this name; {others}")
        return found[0]

    def _condition(
        self, classes: Sequence[int | str] | None, prompts: Sequence[str] | None, count: int | None
    ) -> Condition:
        """Rows for the images of a call."""
        asked = prompts if self.reads_texts else range(len(self.class_names)) if classes is None else classes
        if (classes if self.reads_texts else prompts) is not None or isinstance(asked, str):
            takes = "prompts=[TEXT, ...]" if self.reads_texts else "classes=[CLASS, ...]"
            raise UserError(f"this generator takes {takes}, a list")
        if not asked:
            raise UserError(f"nothing is asked for: give {'prompts' if self.reads_texts else 'classes'}")
        count = len(asked) if count is None else count
        if count < 1:
            raise UserError(f"num_images = {count} must be at least 1")
        if not self.reads_texts:
            return classes_in_turn([self.class_id(word) for word in asked], count)
        if self.encoder is None:
            raise UserError(
                "nothing encodes the prompts: give the T5 of this generator, from_pretrained(text_path=...)"
            )
        texts = [clean_text(text, f"prompts[{place}]") for place, text in enumerate(asked)]
        self.encoder.require(texts)
        return self.encoder([texts[number % len(texts)] for number in range(count)])

    @classmethod
    def from_recipe(cls, recipe: DrawingRecipe, *, device: torch.device | str | None = None) -> Self:
        """The generator that a recipe of `grpo generate`, share or demo names.

        Raises a UserError as the job does: weights that cannot be read, or of other sizes.
        """
        device = _device(device)
        model, text, sampling = recipe.model, recipe.text, recipe.sampling
        names = None if model.is_text else learned_classes(model)
        sizes = generator_sizes(model, recipe.tokenizer, image_size=sampling.image_size, class_names=names)
        can_encode = model.is_text and (text.encoder == "words" or text.features or text.path)
        return cls(
            load_generator(model, sizes),
            build_tokenizer(recipe.tokenizer, device=device),
            sampling=sampling,
            encoder=build_encoder(text, model, device=device) if can_encode else None,
            device=device,
        )

    @classmethod
    def of_run(cls, folder: str | os.PathLike[str], *settings: str, device: torch.device | str | None = None) -> Self:
        """The generator that a run has trained, as `grpo generate FOLDER` draws with it.

        Args:
            settings: flags of `grpo demo`, such as "--sampling.cfg_scale=2".
        """
        arguments = of_run(DemoRecipe, [os.fspath(folder), *settings])
        return cls.from_recipe(load_recipe(DemoRecipe, arguments, needs_files=True), device=device)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's downloads unless it is told not to
        cls,
        place: str | os.PathLike[str],
        *,
        download: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        text_path: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        precision: Precision = "auto",
    ) -> Self:
        """The generator of a folder that `grpo share` or `save_pretrained` wrote, or of a repository on the Hub.

        Args:
            place: the folder, or NAME/REPOSITORY.
            download: fetch what is not here from the Hub. Without it nothing is; what was fetched once is found.
            revision: branch, tag or commit of the repository; token, cache_dir: as in huggingface_hub.
            text_path: folder of the T5 that a text-conditional generator was trained with.
            device: None is a GPU where there is one.
            precision: as `sampling.mixed_precision`. Take fp32 for weights that are to be saved again.

        Raises:
            UserError: no such folder, or what is in it is damaged or not of one generator.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        folder = Path(place) if os.path.isdir(place) else _fetched(str(place), download=download, **hub)
        file = folder / CONFIG_NAME
        config = read(folder)
        given = {**config.sampling, "mixed_precision": precision}
        sampling = sampling_of(Sampling(), given, where=f"{file}: sampling.")
        with reading(f"{file}: generator.architecture"):
            family = family_named(config.generator.architecture)
        model, tokenizer = family.load(folder / EXPORT_NAME), load_vq(folder / SHARED_TOKENIZER)
        require_sizes(model, config.generator, file=folder / EXPORT_NAME)
        require_sizes(tokenizer, config.tokenizer, file=folder / SHARED_TOKENIZER)
        device = _device(device)
        path = None if text_path is None else os.fspath(text_path)
        encoder = None if config.text is None else _encoder(config.text, model, path=path, device=device)
        return cls(
            model,
            tokenizer,
            sampling=sampling,
            encoder=encoder,
            text=config.text,
            device=device,
            files=_companions(folder),
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` call: every file of the folder."""
        exported = family_of(self.model).export(self.model.state_dict())
        save_weights(save_directory / EXPORT_NAME, exported, config=self.model.config)
        save_weights(save_directory / SHARED_TOKENIZER, self.tokenizer.state_dict(), config=self.tokenizer.config)
        config = describe(self.model, self.tokenizer, text=self.text, sampling=self.sampling)
        for name, content in {**self.files, CONFIG_NAME: config.encode()}.items():
            with writing(save_directory / name):
                (save_directory / name).write_bytes(content)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card of a generator that has none among its `files`."""
        share = Share()
        return ModelCard(
            model_card(self.model, self.tokenizer, share=share, place="FOLDER", training=None, has_samples=False)
        )


def _device(wanted: torch.device | str | None) -> torch.device:
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def _fetched(name: str, *, download: bool, **hub: Any) -> Path:
    """Where huggingface_hub keeps a repository; with `download` it is brought there, without it nothing is asked."""
    if download:
        with reading(f"{shorten(name)} cannot be fetched from the Hub"):
            return Path(snapshot_download(name, allow_patterns=[*FILES], **hub))
    try:
        return Path(snapshot_download(name, local_files_only=True, **hub))
    except (OSError, ValueError) as error:  # not there, or no name of a repository
        raise UserError(
            f"{shorten(name)} is no folder here, and nothing is downloaded unasked: give a folder that `grpo share` "
            "wrote, or from_pretrained(NAME, download=True) for a repository on the Hub"
        ) from error


def _companions(folder: Path) -> dict[str, bytes]:
    """What goes with the weights, as far as it is there."""
    found = {}
    for name in COMPANIONS:
        if (folder / name).is_file():
            with reading(f"{folder / name} cannot be read"):
                found[name] = read_bytes(folder / name, largest=LARGEST_COMPANION)
    return found


def _encoder(text: TextFeatures, model: nn.Module, *, path: str | None, device: torch.device) -> TextEncoder | None:
    """What encodes the texts of a shared generator; None where its T5 is not given."""
    if text.encoder == "t5" and path is None:
        return None
    sizes: Any = model.config
    sections = (
        Text(encoder=text.encoder, path=path),
        Model(cls_token_num=sizes.cls_token_num, caption_dim=text.width),
    )
    encoder = build_encoder(*sections, device=device, max_tokens=text.max_tokens)
    text.require_same(encoder, where="the shared generator" if path is None else f"text_path {path}")
    return encoder
