"""The quickstart's first story, in its two recipes: digits, rewarded by a classifier or by likeness.

A story is a module that the job `quickstart` reads: the folder of its recipes, its phases in their order, and what its
table shows. Here the rival of GRPO is the point of a grid of guidance and temperature that has the lowest FID.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from grpo.config import (
    SHIPPED_RECIPES,
    ClassifierRecipe,
    EvaluateRecipe,
    FinetuneRecipe,
    GRPORecipe,
    PretrainRecipe,
    Recipe,
    TokenizerRecipe,
)
from grpo.evaluation import classifier_gap, compare, load_judges, measure_images
from grpo.jobs.evaluate import open_reference
from grpo.jobs.finetune import train as finetune
from grpo.jobs.generate import asked_classes, drawn_images
from grpo.jobs.pretrain import train as train_generator
from grpo.jobs.train_classifier import train as train_classifier
from grpo.jobs.train_grpo import train as train_policy
from grpo.jobs.train_tokenizer import train as train_tokenizer
from grpo.observe import image_grid, progress
from grpo.parallel import World
from grpo.training import GRID_NAME, Phase

CONFIGS = SHIPPED_RECIPES / "quickstart"
TITLE = "Quickstart: GRPO on digits"
GUIDANCE, TEMPERATURES = (1.25, 1.5, 1.75), (0.9, 1.0)  # the rival row's grid: what sampling alone can do, tuned
TUNING_SPLIT, TUNING_IMAGES = "validation", 1000
GRID_IMAGES, GRID_COLUMNS, SHOWN_IMAGES = 100, 20, 20

TABLES = {
    "Results of {count} samples each": {
        "reward": "reward_mean",
        "accuracy": "accuracy",
        "FID": "fid",
        "precision": "precision",
        "recall": "recall",
        "entropy": "entropy",
        "gap": "classifier_gap",
    },
}
"""Tables at the end: their titles, and headings of columns with the metrics in them."""

NOTES = [
    "reward: mean log p(class | image) under the classifier that rewarded. All else is seen by a second classifier of "
    "other digits: accuracy, FID, precision and recall in its features, against the digits of the split "
    "{split!r}, on which no phase was trained.",
    "FID here is not the FID of the literature, whose features are Inception's; compare it within this table only.",
    "entropy: of the drawn codes, nats a code. gap: how much surer of the class the rewarding classifier is "
    "than the judging one, nats; it grows when the reward is deceived.",
    "The rivals are guided: two forward passes to sample. The base needs no more training; the other one had as much "
    "more pre-training as guidance-free training and GRPO took. Of a grid of guidance "
    f"{', '.join(map(str, GUIDANCE))} and temperature {', '.join(map(str, TEMPERATURES))} each is drawn at the point "
    f"whose FID against the digits of the split {TUNING_SPLIT!r} is lowest.",
    "One seed: a run with another seed differs by as much as rows do.",
]

NEXT = {
    "class": "Next: look at digits, grpo generate {run_dir}/grpo; try them on a page, grpo demo {run_dir}/grpo; "
    "the teacher-forced recipe on the same base model, grpo quickstart --recipe vapi; "
    "your own images, docs/own_data.md.",
    "vapi": "Next: the free-running recipe on the same base model, grpo quickstart; your own images, docs/own_data.md.",
}


def plan(options: argparse.Namespace, make: Callable[..., Phase]) -> list[Phase]:
    """The phases in their order, each reading what those before it have written."""
    free = options.recipe == "class"
    improved = "grpo" if free else "grpo_vapi"
    seed = {"training.seed": options.seed}
    tokenizer = {"tokenizer.checkpoint": "tokenizer"}
    judges = {
        "evaluation.reward_checkpoint": "classifier_reward",
        "evaluation.feature_checkpoint": "classifier_judge",
    }
    reward = {"reward.class_log_prob.checkpoint": "classifier_reward"} if free else {}

    def weights(maker: str) -> dict[str, str]:
        return {**tokenizer, "model.checkpoint": maker}

    def judged(maker: str, title: str, name: str = "", job: Callable[..., None] = evaluate) -> Phase:
        return make(name or f"evaluate_{maker}", title, EvaluateRecipe, job, inputs={**weights(maker), **judges})

    def trained(
        name: str, title: str, recipe: type[Recipe], job: Callable[..., None], inputs: Mapping[str, str]
    ) -> Phase:
        return make(name, f"Generator: {title}", recipe, job, inputs=inputs, settings=seed)

    start = "gft" if free else "pretrain"
    phases = [
        make("tokenizer", "Tokenizer", TokenizerRecipe, train_tokenizer, settings=seed),
        make("classifier_reward", "Classifier that rewards", ClassifierRecipe, train_classifier),
        make("classifier_judge", "Classifier that judges", ClassifierRecipe, train_classifier),
        trained("pretrain", "pre-training", PretrainRecipe, train_generator, tokenizer),
        trained("pretrain_more", "more of it, the rival", PretrainRecipe, train_generator, weights("pretrain")),
        trained("gft", "guidance-free training", FinetuneRecipe, finetune, weights("pretrain")),
        trained(improved, "GRPO", GRPORecipe, train_policy, {**weights(start), **reward}),
        judged("pretrain", "base", "evaluate_base"),
        judged("pretrain", "base, tuned guidance", "evaluate_guided", evaluate_tuned),
        judged("pretrain_more", "more pre-training"),
        judged("pretrain_more", "more pre-training, tuned guidance", "evaluate_more_guided", evaluate_tuned),
        judged("gft", "after guidance-free training"),
        judged(improved, "after GRPO"),
    ]
    return [phase for phase in phases if free or phase.folder.name not in ("gft", "evaluate_gft")]


def asked(recipe: EvaluateRecipe) -> list[str]:
    """The class of each image that the page shows."""
    return [str(class_id) for class_id in asked_classes(recipe, GRID_IMAGES).class_ids.tolist()[:SHOWN_IMAGES]]


def evaluate_tuned(recipe: EvaluateRecipe, world: World) -> None:
    """`evaluate` at the point of the grid that has the lowest FID on the tuning split."""
    judge, config = load_judges(recipe.evaluation, device=world.device)["classifier"], recipe.evaluation
    look = partial(measure_images, judge=judge, batch_size=config.batch_size, device=world.device)
    validation = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": TUNING_SPLIT})})
    reference, found = look(open_reference(validation)), {}
    for point in itertools.product(GUIDANCE, TEMPERATURES):
        sampling = recipe.sampling.model_copy(update=dict(zip(("cfg_scale", "temperature"), point, strict=True)))
        count = min(TUNING_IMAGES, config.num_images)
        images = drawn_images(recipe.model_copy(update={"sampling": sampling}), count, device=world.device)
        found[point] = compare(look(images), reference, settings=config, device=world.device)["fid"], sampling
    _, sampling = min(found.values(), key=lambda entry: entry[0])  # the same on every rank
    evaluate(recipe.model_copy(update={"sampling": sampling}), world)


def evaluate(recipe: EvaluateRecipe, world: World) -> None:
    """Draw samples, show them to both classifiers, write result.json and samples.png beside it."""
    config, judges = recipe.evaluation, load_judges(recipe.evaluation, device=world.device)
    look = partial(measure_images, batch_size=config.batch_size, device=world.device)
    reference = look(open_reference(recipe), judges["classifier"])
    samples = drawn_images(recipe, config.num_images, device=world.device)
    show = partial(progress, description="Samples", show=world.is_main)
    seen = look(samples, judges["classifier"], reward=judges["reward"], progress=show)
    entropy = samples.draw.entropy()
    if not world.is_main:
        return
    metrics = compare(seen, reference, settings=config, device=world.device)
    metrics |= {"entropy": entropy, "classifier_gap": classifier_gap(seen)}
    metrics |= recipe.sampling.model_dump(include={"cfg_scale", "temperature"})
    path = Path(config.json_path)
    image_grid(samples.pixels(0, GRID_IMAGES), columns=GRID_COLUMNS).save(path.with_name(GRID_NAME))
    path.write_text(json.dumps(metrics, indent=2) + "\n")
