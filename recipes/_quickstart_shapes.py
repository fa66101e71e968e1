"""The quickstart's second story: drawings of coloured shapes by their captions, rewarded for what is drawn.

The reward fits the renderer to a sample and counts what the caption says of it; the judge is a network, trained on
other drawings. The rival of GRPO is the point of a grid of guidance and temperature at which the judge finds the most
samples right, seen and unseen combinations alike.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from grpo.config import (
    SHIPPED_RECIPES,
    EvaluateRecipe,
    FinetuneRecipe,
    GRPORecipe,
    PretrainRecipe,
    ReaderRecipe,
    TokenizerRecipe,
)
from grpo.evaluation import KeptImages, compare, load_judges, measure_images, measure_shapes
from grpo.jobs.evaluate import asked_texts, open_reference
from grpo.jobs.finetune import train as finetune
from grpo.jobs.generate import drawn_images
from grpo.jobs.pretrain import train as train_generator
from grpo.jobs.train_grpo import train as train_policy
from grpo.jobs.train_reader import train as train_reader
from grpo.jobs.train_tokenizer import train as train_tokenizer
from grpo.observe import image_grid, progress
from grpo.parallel import World
from grpo.shapes import ATTRIBUTES, Fitting
from grpo.training import GRID_NAME, Phase

CONFIGS = SHIPPED_RECIPES / "quickstart_text"
TITLE = "Quickstart: GRPO on drawings of shapes"
GUIDANCE, TEMPERATURES = (1.0, 1.5, 2.0, 3.0), (0.8, 1.0)  # the rival row's grid: what sampling alone can do, tuned
TUNING_SPLIT, TUNING_SHARE = "validation", 0.4  # of the samples of a row, at each point of the grid
GRID_IMAGES, GRID_COLUMNS = 28, 7  # two of each kind of prompt

TABLES = {
    "All right, of {count} samples each": {
        "seen": "seen/all", "unseen": "unseen/all", "by fit": "fit/all", "FID": "fid", "recall": "recall",
        "entropy": "entropy",
    },
    "Seen combinations, by attribute": {f"seen {name}": f"seen/{name}" for name in ATTRIBUTES},
    "Unseen combinations, by attribute": {f"unseen {name}": f"unseen/{name}" for name in ATTRIBUTES},
}  # fmt: skip
"""Tables at the end: their titles, and headings of columns with the metrics in them."""

NOTES = [
    "seen: share of samples in which all is right that the prompt says, of prompts with combinations that the training "
    "has shown; then the share by attribute. unseen: the same of prompts that ask for a shape at a place, a number "
    "of a shape, two colours, or two shapes in a relation that no training image shows. Prompts are those of the "
    "split {split!r}.",
    "All this is seen by a network that was trained on other drawings. by fit: share of all samples that are right "
    "by what rewarded, which fits the renderer to the sample; no network takes part.",
    "FID and recall: in the judging network's features, against drawings of the same prompts; compare them within this "
    "table only. entropy: of the drawn codes, nats a code.",
    "Base with guidance is the rival: nothing to train, but two forward passes to sample. Of a grid of guidance "
    f"{', '.join(map(str, GUIDANCE))} and temperature {', '.join(map(str, TEMPERATURES))} it is the point at which the "
    f"judge finds most right on prompts of the split {TUNING_SPLIT!r}, the mean of seen and unseen.",
    "One seed: a run with another seed differs by as much as rows may do.",
]

NEXT = {
    "text": "Next: a prompt of your own, grpo generate --config quickstart_text/generate --sampling.prompt "
    "'a red ring above a blue cross'; the world itself is in docs/shapes.md."
}


def plan(options: argparse.Namespace, make: Callable[..., Phase]) -> list[Phase]:
    """The phases in their order, each reading what those before it have written."""
    seed = {"training.seed": options.seed}
    tokenizer = {"tokenizer.checkpoint": "tokenizer"}
    base = {**tokenizer, "model.checkpoint": "pretrain"}
    judge = {"evaluation.reader_checkpoint": "reader"}
    tuned, after = ({**tokenizer, "model.checkpoint": maker} for maker in ("gft", "grpo"))
    return [
        make("tokenizer", "Tokenizer", TokenizerRecipe, train_tokenizer, settings=seed),
        make("reader", "Reader that judges", ReaderRecipe, train_reader),
        make("pretrain", "Generator: pre-training", PretrainRecipe, train_generator, inputs=tokenizer, settings=seed),
        make("gft", "Generator: guidance-free training", FinetuneRecipe, finetune, inputs=base, settings=seed),
        make("grpo", "Generator: GRPO", GRPORecipe, train_policy, inputs=tuned, settings=seed),
        make("evaluate_base", "base", EvaluateRecipe, evaluate, inputs={**base, **judge}),
        make("evaluate_guided", "base, tuned guidance", EvaluateRecipe, evaluate_tuned, inputs={**base, **judge}),
        make("evaluate_gft", "after guidance-free training", EvaluateRecipe, evaluate, inputs={**tuned, **judge}),
        make("evaluate_grpo", "after GRPO", EvaluateRecipe, evaluate, inputs={**after, **judge}),
    ]  # fmt: skip


def asked(recipe: EvaluateRecipe) -> list[str]:
    """The caption of each image that the page shows."""
    return [prompt.text for prompt in asked_texts(recipe, recipe.evaluation.num_images)[:GRID_IMAGES]]


def evaluate_tuned(recipe: EvaluateRecipe, world: World) -> None:
    """`evaluate` at the point of the grid where the judge finds most right on the tuning split."""
    config = recipe.evaluation
    read = {"judge": load_judges(config, device=world.device)["reader"].read}
    validation = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": TUNING_SPLIT})})
    prompts, found = asked_texts(validation, round(TUNING_SHARE * config.num_images)), []
    texts = [prompt.text for prompt in prompts]
    for cfg_scale, temperature in itertools.product(GUIDANCE, TEMPERATURES):
        sampling = recipe.sampling.model_copy(update={"cfg_scale": cfg_scale, "temperature": temperature})
        trial = recipe.model_copy(update={"sampling": sampling})
        drawn = drawn_images(trial, len(prompts), prompts, device=world.device)
        seen = measure_shapes(drawn, texts, read, batch_size=config.batch_size, device=world.device)["judge"]
        found.append((seen["seen/all"] + seen["unseen/all"], sampling))
    _, sampling = max(found, key=lambda entry: entry[0])  # the same on every rank
    evaluate(recipe.model_copy(update={"sampling": sampling}), world)


def evaluate(recipe: EvaluateRecipe, world: World) -> None:
    """Draw samples, show them to judge and reward, write result.json and samples.png beside it."""
    config = recipe.evaluation
    judge, prompts = load_judges(config, device=world.device)["reader"], asked_texts(recipe, config.num_images)
    samples = KeptImages(drawn_images(recipe, len(prompts), prompts, device=world.device))
    show = partial(progress, description="Samples", show=world.is_main)
    how = {"batch_size": config.batch_size, "device": world.device}
    texts = [prompt.text for prompt in prompts]
    read = measure_shapes(samples, texts, {"judge": judge.read, "fit": Fitting()}, **how, progress=show)
    seen, reference = (measure_images(images, judge, **how) for images in (samples, open_reference(recipe)))
    entropy = samples.source.draw.entropy()
    if not world.is_main:
        return
    metrics = compare(seen, reference, settings=config, device=world.device) | read["judge"]
    metrics |= {f"fit/{name}": value for name, value in read["fit"].items()}
    metrics |= {"accuracy": metrics["unseen/all"], "entropy": entropy}
    metrics |= recipe.sampling.model_dump(include={"cfg_scale", "temperature"})
    path = Path(config.json_path)
    image_grid(samples.pixels(0, GRID_IMAGES), columns=GRID_COLUMNS).save(path.with_name(GRID_NAME))
    path.write_text(json.dumps(metrics, indent=2) + "\n")
