"""Features of all texts of a data set, by a T5 encoder, computed once to disk for every run that needs them.

grpo encode-text --data.path images --text.path flan-t5-xl --encode_text.output features
torchrun --nproc_per_node=8 -m grpo encode-text --data.path prompts.txt --text.path flan-t5-xl \\
    --encode_text.output features
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("encode-text")

from collections.abc import Sequence

from grpo.config import EncodeTextRecipe, load_recipe
from grpo.data import on_main_rank, open_captions
from grpo.observe import progress
from grpo.parallel import World, barrier, distributed
from grpo.texts import FeatureWriter, T5Encoder


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, join the process group, encode."""
    recipe = load_recipe(EncodeTextRecipe, arguments, needs_files=True)
    with distributed(recipe.parallel.timeout) as world:
        encode_texts(recipe, world)


def encode_texts(recipe: EncodeTextRecipe, world: World) -> None:
    """The whole job on this rank: every size-th of the shards of texts that have no features yet.

    Texts are sorted by length, so that little is computed for padding.
    """
    config = recipe.encode_text
    texts = open_captions(recipe.data).captions_of.distinct()
    how = {"max_tokens": config.max_tokens, "precision": config.precision}
    encoder = T5Encoder(recipe.text.path, device=world.device, rows=config.max_tokens, width=None, **how)
    writer = FeatureWriter(config.output, encoder=encoder.identity, width=encoder.width, **how)
    known = on_main_rank(writer.start)
    pending = sorted((text for text in texts if writer.key(text) not in known), key=len)
    if world.is_main and len(pending) < len(texts):
        print(f"{config.output}: features of {len(texts) - len(pending)} of {len(texts)} texts are there already")
    shards = [pending[start : start + config.shard_size] for start in range(0, len(pending), config.shard_size)]
    for shard in progress(shards[world.rank :: world.size], description="encode texts", show=world.is_main):
        starts = range(0, len(shard), config.batch_size)
        batches = [encoder.encode(shard[start : start + config.batch_size]) for start in starts]
        writer.write(shard, [rows for batch in batches for rows in batch])
    barrier()  # all shards are there
    if world.is_main:
        print(f"{config.output}: features of {writer.finish()} texts, {encoder.width} wide")
    barrier()
