"""Images from a trained generator: a PNG grid, a folder of PNGs, an .npz.

python recipes/generate.py --model.checkpoint gpt.pt --tokenizer.checkpoint vq.pt --output.grid grid.png
torchrun --nproc_per_node=8 recipes/generate.py --config sample.toml --output.npz samples.npz --output.num_images 50000
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # recipes/grpo.py would be imported in place of the package grpo
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from grpo.config import GenerateRecipe, Output, UserError, load_recipe
from grpo.evaluation import DrawnImages, NpzWriter, batches_in_order, classes_in_turn, make_writable, save_pngs
from grpo.observe import image_grid, progress
from grpo.parallel import World, barrier, distributed, run_main
from grpo.training.image_sampler import load_sampler


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, draw."""
    recipe = load_recipe(GenerateRecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        draw_images(recipe, world)


def draw_images(recipe: GenerateRecipe, world: World) -> None:
    """The whole job on this rank; the images do not depend on the number of ranks."""
    output, sampling = recipe.output, recipe.sampling
    if world.is_main:
        prepare(output)
    barrier()  # the folder is there
    sampler = load_sampler(recipe.model, recipe.tokenizer, sampling, device=world.device)

    def draw(class_ids: Tensor, row_ids: Tensor) -> Tensor:
        pixels = sampler(class_ids, row_ids)
        if output.folder is not None:
            save_pngs(output.folder, pixels, row_ids)
        return pixels

    classes = range(recipe.model.num_classes) if sampling.class_ids == "all" else sampling.class_ids
    images = DrawnImages(classes_in_turn(classes, output.num_images), draw)
    side = sampling.resize_to or sampling.image_size
    show = partial(progress, description="generate", show=world.is_main)
    kept: list[Tensor] = []
    with ExitStack() as stack:
        npz = None
        if output.npz is not None and world.is_main:
            npz = stack.enter_context(NpzWriter(output.npz, images.class_ids, size=(side, side)))
        for pixels in batches_in_order(images, batch_size=sampling.batch_size, progress=show):
            if npz is not None:
                npz.write(pixels)
            if output.grid is not None:
                kept.append(pixels)
    if world.is_main:
        if output.grid is not None:
            image_grid(torch.cat(kept), columns=output.grid_columns).save(output.grid)
        written = [path for path in (output.grid, output.folder, output.npz) if path is not None]
        print(f"{output.num_images} images: {', '.join(written)}")


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


if __name__ == "__main__":
    run_main(main)
