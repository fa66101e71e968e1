"""Models of a recipe to be trained: parallelized, with weights from a checkpoint or, seeded, at random."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from grpo.config import (
    ActivationCheckpoint,
    ClassifierRecipe,
    Compile,
    GeneratorRecipe,
    Lora,
    ReaderRecipe,
    TokenizerRecipe,
    Training,
    TrainingRecipe,
    UserError,
)
from grpo.data import ImageDataset, build_dataset, build_text_dataset
from grpo.models import (
    Classifier,
    ClassifierConfig,
    VQModel,
    WithoutAdapter,
    generator_sizes,
    get_family,
    learned_classes,
    load_adapter,
    load_generator,
    load_vq,
    mark_trained,
    tokenizer_sizes,
)
from grpo.parallel import World, compute_dtype, load_full_state_dict, parallelize
from grpo.shapes import Reader, ReaderConfig

Network = TypeVar("Network", bound=nn.Module)


def build_data(recipe: GeneratorRecipe, *, new_classes: int = 0) -> ImageDataset:
    """The data set that a generator is trained on, which asks for images in the model's classes or in texts."""
    if recipe.model.is_text:
        return build_text_dataset(recipe.data, recipe.text, recipe.model)
    learned = learned_classes(recipe.model)
    return build_dataset(recipe.data, num_classes=recipe.model.num_classes, learned=learned, new_classes=new_classes)


def build_generator(
    recipe: GeneratorRecipe,
    *,
    checkpoint: str | None,
    class_names: Sequence[str] | None = None,
    mesh: DeviceMesh,
    world: World,
    trained: bool = True,
) -> nn.Module:
    """The image generator with the weights of `checkpoint`; None draws them at random.

    `class_names` are written with its weights. Only what the recipe trains has a gradient: all, the embeddings of the
    classes, or a LoRA adapter, which one that is not `trained` lacks.
    """
    section, lora = recipe.model, recipe.lora if trained else Lora()
    names = class_names or None  # a text-conditional model has none
    sizes = generator_sizes(section, recipe.tokenizer, image_size=recipe.data.image_size, class_names=names)

    def make() -> nn.Module:
        return mark_trained(get_family(section.name).build(sizes), section, lora)

    def load() -> nn.Module:
        base = section.model_copy(update={"adapter": None}) if recipe.lora.rank else section
        model = load_generator(base, sizes, checkpoint=checkpoint, new_classes=section.new_classes)
        mark_trained(model, section, lora)
        if lora.rank and section.adapter is not None:
            load_adapter(model, section.adapter)
        return model

    return _spread(make, load if checkpoint else None, recipe, mesh=mesh, world=world)


def build_frozen(
    recipe: GeneratorRecipe,
    trained: nn.Module,
    *,
    checkpoint: str | None,
    class_names: Sequence[str] | None = None,
    mesh: DeviceMesh,
    world: World,
) -> nn.Module | WithoutAdapter:
    """A generator with the weights of `checkpoint` that is not trained: a reference or a teacher.

    With the weights that the recipe starts from it is the trained one without its adapter, where there is one.
    """
    if recipe.lora.rank and checkpoint == recipe.model.checkpoint:
        return WithoutAdapter(trained)
    places = {"class_names": class_names, "mesh": mesh, "world": world}
    return build_generator(recipe, checkpoint=checkpoint, trained=False, **places).eval().requires_grad_(False)


def build_trainable_tokenizer(recipe: TokenizerRecipe, *, mesh: DeviceMesh, world: World) -> VQModel:
    """The recipe's tokenizer; its codebook has no gradient where it follows a moving average."""
    checkpoint, loss = recipe.tokenizer.checkpoint, recipe.tokenizer_loss
    sizes = replace(tokenizer_sizes(recipe.tokenizer), commit_weight=loss.commitment_weight)

    def make() -> VQModel:
        model = VQModel(sizes)
        model.quantize.requires_grad_(loss.codebook_update == "gradient")
        return model

    load = partial(load_vq, checkpoint, sizes) if checkpoint else None
    return _spread(make, load, recipe, mesh=mesh, world=world, convolutional=True)


def build_classifier(
    recipe: ClassifierRecipe, *, class_names: Sequence[str], mesh: DeviceMesh, world: World
) -> Classifier:
    """The recipe's classifier, whose classes are called so."""
    make = partial(Classifier, classifier_sizes(recipe, class_names))
    return _spread(make, None, recipe, mesh=mesh, world=world, convolutional=True)


def classifier_sizes(recipe: ClassifierRecipe, class_names: Sequence[str] | None = None) -> ClassifierConfig:
    """Those of a recipe. Raises a UserError: no such width."""
    names = None if class_names is None else tuple(class_names)
    try:
        width, num_classes = recipe.classifier.width, recipe.classifier.num_classes
        return ClassifierConfig(width=width, num_classes=num_classes, class_names=names)
    except ValueError as error:
        raise UserError(f"classifier.width: {error}") from error


def build_reader(recipe: ReaderRecipe, *, mesh: DeviceMesh, world: World) -> Reader:
    """The recipe's reader of shapes."""
    return _spread(partial(Reader, reader_sizes(recipe)), None, recipe, mesh=mesh, world=world, convolutional=True)


def reader_sizes(recipe: ReaderRecipe) -> ReaderConfig:
    """Those of a recipe. Raises a UserError: no such width."""
    try:
        return ReaderConfig(width=recipe.reader.width)
    except ValueError as error:
        raise UserError(f"reader.width: {error}") from error


def autocast(training: Training, device: torch.device) -> torch.autocast:
    """The context of a convolutional network's forward pass in the recipe's precision."""
    dtype = compute_dtype(training.mixed_precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _spread(
    make: Callable[[], Network],
    load: Callable[[], Network] | None,
    recipe: TrainingRecipe,
    *,
    mesh: DeviceMesh,
    world: World,
    convolutional: bool = False,
) -> Network:
    """Parallelize what `make` makes, with the weights of `load`, or else of `make` under the recipe's seed.

    Rank 0 alone holds the whole model, on its CPU; the others get their shards by broadcast. FSDP2 casts the parameters
    of a GPT once a step. Those of convolutional networks stay fp32, for group statistics and the comparison with the
    codebook; `autocast` lowers what can be lowered.
    """
    torch.manual_seed(recipe.training.seed)
    weights = (load or make)().state_dict() if world.is_main else None
    with torch.device("meta"):
        model = make()
    parallelize(
        model,
        mesh=mesh,
        parallel=recipe.parallel,
        compile=getattr(recipe, "compile", Compile()),
        activation_checkpoint=getattr(recipe, "activation_checkpoint", ActivationCheckpoint()),
        training=recipe.training.model_copy(update={"mixed_precision": "fp32"} if convolutional else None),
    )
    load_full_state_dict(model, weights, device=world.device)
    return model
