"""Images from a trained generator: a PNG grid, a folder of PNGs, an .npz.

grpo generate --model.checkpoint gpt.pt --tokenizer.checkpoint vq.pt --output.grid grid.png
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
from torch import Tensor

from grpo.config import EvaluateRecipe, GenerateRecipe, Output, UserError, load_recipe
from grpo.evaluation import (
    DrawnImages,
    NpzWriter,
    batches_in_order,
    drawn_classes,
    make_writable,
    save_image,
    save_pngs,
)
from grpo.models import Condition
from grpo.observe import image_grid, progress
from grpo.parallel import World, barrier, distributed
from grpo.rollout import load_sampler

Draw = Callable[[Condition, Tensor], Tensor]  # (condition of B rows, row_ids [B]) -> [B, 3, H, W] uint8


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, draw."""
    recipe = load_recipe(GenerateRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        draw_images(recipe, world)


def draw_images(recipe: GenerateRecipe, world: World) -> None:
    """The whole job on this rank; the images do not depend on the number of ranks."""
    output = recipe.output
    if world.is_main:
        prepare(output)
    barrier()  # the folder is there
    images = drawn_images(recipe, output.num_images, device=world.device)
    if output.folder is not None:
        images = DrawnImages(images.condition, saving_pngs(images.draw, output.folder))
    side = recipe.sampling.resize_to or recipe.sampling.image_size
    writes_npz = output.npz is not None and world.is_main
    show = partial(progress, description="generate", show=world.is_main)
    kept: list[Tensor] = []
    with NpzWriter(output.npz, images.class_ids, size=(side, side)) if writes_npz else nullcontext() as npz:
        for pixels in batches_in_order(images, batch_size=recipe.sampling.batch_size, progress=show):
            if npz is not None:
                npz.write(pixels)
            if output.grid is not None:
                kept.append(pixels)
    if world.is_main:
        if output.grid is not None:
            save_image(image_grid(torch.cat(kept), columns=output.grid_columns), output.grid)
        written = [path for path in (output.grid, output.folder, output.npz) if path is not None]
        print(f"{output.num_images} images: {', '.join(written)}")


def drawn_images(recipe: GenerateRecipe | EvaluateRecipe, count: int, *, device: torch.device) -> DrawnImages:
    """Images that the recipe's generator draws when they are looked at; their `draw` is its `ImageSampler`."""
    sampling = recipe.sampling
    classes = range(recipe.model.num_classes) if sampling.class_ids == "all" else sampling.class_ids
    sampler = load_sampler(recipe.model, recipe.tokenizer, sampling, device=device)
    condition = drawn_classes(classes, count, order=sampling.class_order, seed=sampling.seed)
    return DrawnImages(condition, sampler)


def saving_pngs(draw: Draw, folder: str) -> Draw:
    """The same draw, which writes each image into `folder` too."""

    def draw_and_save(condition: Condition, row_ids: Tensor) -> Tensor:
        pixels = draw(condition, row_ids)
        save_pngs(folder, pixels, row_ids)
        return pixels

    return draw_and_save


def prepare(output: Output) -> None:
    """Make the folders of the output; images must not be mixed with those of another run."""
    if output.folder is not None:
        folder = Path(output.folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"output.folder {folder} is not empty: empty it or give another one")
        make_writable(folder, key="output.folder", folder=True)
    for key, path, suffix in (("grid", output.grid, ".png"), ("npz", output.npz, ".npz")):
        if path is not None and not path.endswith(suffix):
            raise UserError(f"output.{key} {path} must end in {suffix}")
        if path is not None:
            make_writable(path, key=f"output.{key}")
