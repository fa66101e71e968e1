"""Images from a trained generator, by class or by prompt: a PNG grid, a folder of PNGs, an .npz.

grpo generate runs/NAME --output.grid grid.png
grpo generate --model.checkpoint gpt.pt --tokenizer.checkpoint vq.pt --output.grid grid.png
grpo generate --config text/generate --sampling.prompt "a dog on a red sofa"
torchrun --nproc_per_node=8 -m grpo generate --config sample.toml --output.npz samples.npz --output.num_images 50000
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("generate")

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from grpo.config import EvaluateRecipe, GenerateRecipe, Output, Sampling, UserError, load_recipe, of_run
from grpo.evaluation import (
    DrawnImages,
    NpzWriter,
    SaveImages,
    batches_in_order,
    build_layout,
    drawn_classes,
    make_writable,
    save_image,
)
from grpo.models import ClassCondition, Condition
from grpo.observe import captioned_grid, image_grid, progress
from grpo.parallel import World, barrier, distributed
from grpo.rollout import load_sampler
from grpo.texts import Prompt, TextList, build_encoder, clean_text, read_prompts

Draw = Callable[[Condition, Tensor], Tensor]  # (condition of B rows, row_ids [B]) -> [B, 3, H, W] uint8


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, draw."""
    recipe = load_recipe(GenerateRecipe, of_run(GenerateRecipe, arguments), needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        draw_images(recipe, world)


def draw_images(recipe: GenerateRecipe, world: World) -> None:
    """The whole job on this rank; the images do not depend on the number of ranks."""
    output, prompts = recipe.output, asked_prompts(recipe.sampling)
    if world.is_main:
        prepare(output)
    barrier()  # the folder is there
    count = output.num_images
    if output.layout != "plain":
        prompts = [prompt for prompt in prompts for _ in range(output.images_per_prompt)]
        count = len(prompts)
    images = drawn_images(recipe, count, prompts, device=world.device)
    if output.folder is not None:
        save = build_layout(output, prompts)
        images = DrawnImages(images.condition, saving_pngs(images.draw, save))
    side = recipe.sampling.resize_to or recipe.sampling.image_size
    writes_npz = output.npz is not None and world.is_main
    show = partial(progress, description="generate", show=world.is_main)
    kept: list[Tensor] = []
    with (
        NpzWriter(output.npz, images.class_ids, size=(side, side), count=count) if writes_npz else nullcontext() as npz
    ):
        for pixels in batches_in_order(images, batch_size=recipe.sampling.batch_size, progress=show):
            if npz is not None:
                npz.write(pixels)
            if output.grid is not None:
                kept.append(pixels)
    if world.is_main:
        if output.grid is not None:
            save_image(draw_grid(torch.cat(kept), output, prompts), output.grid)
        written = [path for path in (output.grid, output.folder, output.npz) if path is not None]
        print(f"{count} images: {', '.join(written)}")


def draw_grid(images: Tensor, output: Output, prompts: Sequence[Prompt]) -> Image.Image:
    """All images in one picture, with their prompts where there are any."""
    if not prompts:
        return image_grid(images, columns=output.grid_columns)
    return captioned_grid(images, texts_in_turn(prompts, len(images)), columns=output.grid_columns)


def asked_prompts(sampling: Sampling) -> list[Prompt]:
    """The prompts of a text-conditional model; none for one that takes classes."""
    if sampling.prompt is not None:
        text = clean_text(sampling.prompt, "sampling.prompt")
        return [Prompt(text, "0", {"prompt": text})]
    return read_prompts(sampling.prompts) if sampling.prompts is not None else []


def texts_in_turn(prompts: Sequence[Prompt], count: int) -> list[str]:
    """`count` texts, one after the other, again and again."""
    return [prompts[number % len(prompts)].text for number in range(count)]


def drawn_images(
    recipe: GenerateRecipe | EvaluateRecipe, count: int, prompts: Sequence[Prompt] = (), *, device: torch.device
) -> DrawnImages:
    """Images of prompts, or else of classes, in turn, that the recipe's generator draws when they are looked at.

    Their `draw` is its `ImageSampler`.
    """
    sampling = recipe.sampling
    if prompts:
        asked = TextList(texts_in_turn(prompts, count), build_encoder(recipe.text, recipe.model, device=device))
        asked.encoder.require(asked.texts)
    else:
        asked = asked_classes(recipe, count)
    return DrawnImages(asked, load_sampler(recipe.model, recipe.tokenizer, sampling, device=device))


def asked_classes(recipe: GenerateRecipe | EvaluateRecipe, count: int) -> ClassCondition:
    """The classes that a generator without prompts is asked for, a row an image."""
    sampling = recipe.sampling
    classes = range(recipe.model.num_classes) if sampling.class_ids == "all" else sampling.class_ids
    return drawn_classes(classes, count, order=sampling.class_order, seed=sampling.seed)


def saving_pngs(draw: Draw, save: SaveImages) -> Draw:
    """The same draw, which writes each image too."""

    def draw_and_save(condition: Condition, row_ids: Tensor) -> Tensor:
        pixels = draw(condition, row_ids)
        save(pixels, row_ids)
        return pixels

    return draw_and_save


def prepare(output: Output) -> None:
    """Make the folders of the output; images must not be mixed with those of another run."""
    if output.folder is not None:
        folder = Path(output.folder)
        make_writable(folder, key="output.folder", folder=True)
        if any(folder.iterdir()):
            raise UserError(f"output.folder {folder} is not empty: empty it or give another one")
    for key, path, suffix in (("grid", output.grid, ".png"), ("npz", output.npz, ".npz")):
        if path is not None and not path.endswith(suffix):
            raise UserError(f"output.{key} {path} must end in {suffix}")
        if path is not None:
            make_writable(path, key=f"output.{key}")
