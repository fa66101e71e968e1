"""A folder with a trained generator, its tokenizer and a model card, to load and to publish.

grpo share runs/NAME --share.output shared/digits --share.license apache-2.0
grpo share runs/NAME --share.output shared/digits --share.push me/digits
grpo share --model.checkpoint c2i_B_256.pt --tokenizer.checkpoint vq_ds16_c2i.pt --share.output shared/llamagen

The folder has model.safetensors, tokenizer.safetensors, config.json and README.md, the card, with recipe, results and
samples. `grpo.sharing.ImageGenerator.from_pretrained(FOLDER)` draws with it, and so do grpo generate FOLDER, grpo
evaluate FOLDER and grpo demo FOLDER. Nothing leaves this machine without --share.push.
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("share")

import io
from collections.abc import Sequence
from pathlib import Path

import torch

from grpo.config import SHARED_RECIPE, Output, ShareRecipe, UserError, load_recipe, of_run, reading, shared_recipe
from grpo.data import to_pixels
from grpo.evaluation import make_writable
from grpo.jobs.generate import asked_prompts, draw_grid
from grpo.parallel import distributed
from grpo.sharing import (
    CARD_NAME,
    SAMPLES_NAME,
    ImageGenerator,
    model_card,
    read_training,
)


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, then the weights, draw samples, write the folder, push it if asked."""
    recipe = load_recipe(ShareRecipe, of_run(ShareRecipe, arguments), needs_files=True)
    folder = Path(recipe.share.output)
    with distributed(recipe.parallel.timeout) as world:
        if not world.is_main:
            return
        make_writable(folder, key="share.output", folder=True)
        if any(folder.iterdir()):
            raise UserError(f"share.output {folder} is not empty: empty it or give another one")
        generator = with_companions(recipe, device=world.device)
    generator.save_pretrained(folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if recipe.share.license is None:
        print(f"No licence is set: say it in {folder / CARD_NAME}, or with --share.license")
    if recipe.share.push is not None:
        with reading(f"share.push: {recipe.share.push} could not be written", remedy="`hf auth login` lets you write"):
            address = generator.push_to_hub(recipe.share.push, private=recipe.share.private)
        print(f"pushed: {address}")


def with_companions(recipe: ShareRecipe, *, device: torch.device) -> ImageGenerator:
    """The recipe's generator, in the precision of its weights, with all that goes into the folder beside them."""
    sampling = recipe.sampling.model_copy(update={"mixed_precision": "fp32"})
    generator = ImageGenerator.from_recipe(recipe.model_copy(update={"sampling": sampling}), device=device)
    samples = drawn_samples(recipe, generator)
    training = None if recipe.share.run is None else read_training(recipe.share.run)
    card = model_card(
        generator.model,
        generator.tokenizer,
        share=recipe.share,
        place=recipe.share.push or Path(recipe.share.output).resolve().name,
        training=training,
        has_samples=samples is not None,
    )
    generator.files = {CARD_NAME: card.encode(), SHARED_RECIPE: shared_recipe(recipe).encode()}
    if samples is not None:
        generator.files[SAMPLES_NAME] = samples
    return generator


def drawn_samples(recipe: ShareRecipe, generator: ImageGenerator) -> bytes | None:
    """A PNG with images of the classes or the prompts of the recipe, in turn; None where it wants none."""
    prompts, count, class_ids = asked_prompts(recipe.sampling), recipe.share.num_samples, recipe.sampling.class_ids
    if not count or (generator.reads_texts and not prompts):
        return None
    asked = {"prompts": [prompt.text for prompt in prompts]} if prompts else {}
    asked |= {"classes": class_ids} if class_ids != "all" and not prompts else {}
    images = generator(**asked, num_images=count, seed=recipe.sampling.seed)
    grid = draw_grid(torch.stack([to_pixels(image) for image in images]), Output(), prompts)
    grid.save(file := io.BytesIO(), "PNG")
    return file.getvalue()
