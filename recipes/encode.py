"""Codes of a whole data set, encoded once to disk for every run that needs them.

grpo encode --config encode_imagenet
torchrun --nproc_per_node=8 -m grpo encode --data.path images --tokenizer.checkpoint vq.pt --encode.output codes
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("encode")

from collections.abc import Sequence

import numpy as np

from grpo.config import EncodeRecipe, load_recipe
from grpo.data import CodeWriter, ImageDataset, Views, build_dataset, load_views, normalize, worker_count
from grpo.models import VQModel, build_tokenizer, weights_sha256
from grpo.observe import progress
from grpo.parallel import World, barrier, distributed


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, encode."""
    recipe = load_recipe(EncodeRecipe, arguments)
    with distributed(recipe.parallel.timeout) as world:
        encode(recipe, world)


def encode(recipe: EncodeRecipe, world: World) -> None:
    """The whole job on this rank: every size-th of the shards that are not there yet.

    A shard is always cut into the same batches, so it is the same whichever rank writes it, and whenever.
    """
    config = recipe.encode
    dataset = build_dataset(recipe.data, num_classes=None)  # classes are the source's; a run compares them with its own
    tokenizer = build_tokenizer(recipe.tokenizer, device=world.device)
    views = Views(config, recipe.data.image_size)
    writer = CodeWriter(config.output, describe(recipe, dataset, tokenizer, views), dataset.class_ids)
    pending = writer.start()
    if world.is_main and len(pending) < len(writer.shards):
        print(f"{config.output}: {len(writer.shards) - len(pending)} of {len(writer.shards)} shards are there already")
    mine = pending[world.rank :: world.size]
    step = max(1, config.batch_size // views.count)  # images encoded together
    parts = {number: cut(writer.shards[number], step) for number in mine}
    all_parts = [part for of_shard in parts.values() for part in of_shard]
    loaded = load_views(dataset, all_parts, views, num_workers=worker_count(recipe.data.num_workers))
    for number in progress(mine, description="encode", show=world.is_main):
        shard, unreadable = writer.shards[number], {}
        codes = np.zeros((len(shard), views.count, writer.about["length"]), dtype=np.int64)
        for viewed in (next(loaded) for _ in parts[number]):
            for index, reason in viewed.unreadable.items():
                dataset.record_unreadable(index, reason)
            unreadable |= viewed.unreadable
            if viewed.pixels is not None:
                pixels = viewed.pixels.to(world.device).flatten(0, 1)  # [n*A, 3, S, S]
                found = tokenizer.encode(normalize(pixels)).view(-1, views.count, codes.shape[2])  # [n, A, T]
                codes[np.array(viewed.readable) - shard.start] = found.cpu().numpy()
        writer.write(number, codes, unreadable)
    barrier()  # all shards are there
    if world.is_main:
        folder = writer.finish()
        print(f"{folder}: {len(folder.labels)} images, {folder.variants} x {folder.length} codes each")


def cut(rows: range, size: int) -> list[range]:
    """Parts of `size`, of which the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def describe(recipe: EncodeRecipe, dataset: ImageDataset, tokenizer: VQModel, views: Views) -> dict[str, object]:
    """What the codes are of and how they are made: whoever uses them compares it with what they have."""
    config = recipe.encode
    side = recipe.data.image_size // recipe.tokenizer.downsample_size
    return {
        "format": 1,
        "count": len(dataset),
        "variants": views.count,
        "length": side**2,
        "codebook_size": tokenizer.config.codebook_size,
        "shard_size": config.shard_size,
        "augmentation": config.augmentation,
        "crop_ranges": config.crop_ranges if config.augmentation == "ten_crop" else [],
        "class_names": list(dataset.source_names),
        "fingerprint": {**dataset.fingerprint, "tokenizer": weights_sha256(tokenizer)},
    }
