"""The model card: README.md of a shared generator, with the metadata by which the Hub finds it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from huggingface_hub import ModelCardData
from torch import nn

from grpo.config import (
    RECIPES,
    GeneratorRecipe,
    Share,
    UserError,
    is_url,
    job_of_file,
    printable,
    read_text,
    reading,
    recipe_from_toml,
)
from grpo.environment import code_commit, environment
from grpo.evaluation import read_result
from grpo.observe import end_table, judge_table, read_run

USE = """\
```python
from grpo.sharing import ImageGenerator

generator = ImageGenerator.from_pretrained("{place}")  # this folder; me/name with download=True fetches from the Hub
images = generator({asked}, num_images=4, seed=0)  # PIL images
```

The package is `autoregressive-grpo`. On the command line, `grpo generate FOLDER` and `grpo demo FOLDER` draw too."""
NO_LICENSE = """\
Not set. Whoever publishes these weights says here, and as `license:` in the head of this file, what may be done with
them. The licences of the weights that they were trained from, of the tokenizer and of the images may have a say in
it."""


class Training(NamedTuple):
    """What is known of how a generator was trained: its recipe, and tables of results in Markdown."""

    recipe: GeneratorRecipe
    tables: list[str]


def read_training(folder: str | Path) -> Training:
    """Of a run's folder. Raises a UserError: it is none, or a file in it is damaged."""
    folder = Path(folder)
    file = folder / "recipe.toml"
    with reading(f"{file} cannot be read"):
        recipe = recipe_from_toml(RECIPES[job_of_file(str(file)) or "train"], read_text(file), origin=str(file))
    if not isinstance(recipe, GeneratorRecipe):
        raise UserError(f"{file} is not of a run that trained a generator")
    run = read_run(folder, name=folder.resolve().name)
    tables = [
        markdown(table.title, table.columns, table.rows, note=table.note)
        for table in (judge_table([run]), end_table([run]))
        if table is not None and table.rows
    ]
    return Training(recipe, [*_evaluations(folder), *_quickstart_rows(folder.resolve().parent), *tables])


def _evaluations(folder: Path) -> Iterator[str]:
    """A table for each result file of `grpo evaluate` in a folder."""
    for path in sorted(folder.glob("*.json")):
        try:
            result = read_result(path)
        except UserError:
            continue  # another file of the run's
        judges = list(result.metrics)
        names = dict.fromkeys(name for metrics in result.metrics.values() for name in metrics)
        rows = [(name, [_number(result.metrics[judge].get(name)) for judge in judges]) for name in names]
        count = result.about["images"].get("count", "?")
        yield markdown(f"Evaluation ({path.name})", judges, rows, note=f"{count} images.")


def _quickstart_rows(folder: Path) -> Iterator[str]:
    """The table of results.json, which the quickstart writes beside its runs; nothing where that is another file."""
    try:
        with reading("results.json"):
            rows = json.loads(read_text(folder / "results.json"))["rows"]
            columns = [key for key, value in rows[0].items() if isinstance(value, int | float) and key != "seed"]
            cells = [(str(row["name"]), [_number(row.get(key)) for key in columns]) for row in rows]
    except UserError:
        return
    yield markdown("Results of the quickstart", columns, cells, note=f"One seed, {rows[0].get('seed')}.")


def model_card(
    model: nn.Module, tokenizer: nn.Module, *, share: Share, place: str, training: Training | None, has_samples: bool
) -> str:
    """The whole card.

    Args:
        share: what the user says of the weights.
        place: name of the folder, or of the repository.
        training: of the run that made them; None where it is not known.
    """
    parts = [
        _head(model, share),
        f"# {share.title or place}",
        "![Samples](samples.png)" if has_samples else "",
        _summary(model, tokenizer),
        "## Use",
        USE.format(place=place, asked='prompts=["..."]' if _reads_texts(model) else "classes=[0]"),
        *(["## Results", *training.tables] if training is not None and training.tables else []),
        "## Training",
        *_training_lines(share, training),
        "## Licence",
        f"{share.license}, as the publisher says." if share.license else NO_LICENSE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(model: nn.Module, share: Share) -> str:
    """The metadata. A licence is there only where the user names one."""
    data = ModelCardData(
        library_name="autoregressive-grpo",
        pipeline_tag="text-to-image" if _reads_texts(model) else "unconditional-image-generation",
        tags=["autoregressive", "image-generation", "grpo", "reinforcement-learning"],
        license=share.license,
        base_model=share.base_model,
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(model: nn.Module, tokenizer: nn.Module) -> str:
    """What it is, in numbers."""
    sizes: Any = model.config
    codes: Any = tokenizer.config
    side = math.isqrt(sizes.block_size) * codes.downsample_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    asked = "a text" if _reads_texts(model) else f"one of {sizes.num_classes} classes"
    return (
        f"An autoregressive generator of images of {side} x {side} pixels: a {type(model).__name__} with "
        f"{parameters:,} parameters, asked by {asked}, draws {sizes.block_size} codes out of {sizes.vocab_size}, which "
        f"the tokenizer {type(tokenizer).__name__} decodes."
    )


def _training_lines(share: Share, training: Training | None) -> Iterator[str]:
    """Where the weights come from."""
    known = environment()
    packages = [f"{name} {version}" for name, version in known["versions"].items()]
    packages += [f"commit {commit}"] if (commit := code_commit()) else []
    lines: dict[str, object] = {"Base model": share.base_model, "This folder was written with": ", ".join(packages)}
    if training is not None:
        section = training.recipe.model
        lines["Weights at the start"] = _name(section.checkpoint) if section.checkpoint else "random"
        lines["Steps"] = training.recipe.training.steps
        lines["Job"] = f"`grpo {training.recipe.job}`"
    yield "\n".join(f"- {name}: {value}" for name, value in lines.items() if value is not None)
    if training is not None:
        recipe = without_places({"job": training.recipe.job, **training.recipe.model_dump(exclude_defaults=True)})
        text = tomli_w.dumps(recipe)
        yield f"<details><summary>Recipe, without keys at their defaults</summary>\n\n```toml\n{text}```\n\n</details>"


def without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what only its author's machines know: of paths and addresses the last name is left."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            kept[key] = without_places(value)
        elif value is not None:
            kept[key] = _name(value) if isinstance(value, str) else value
    return {key: value for key, value in kept.items() if value != {}}


def _name(text: str) -> str:
    """The last name of a path or an address; other texts as they are."""
    is_place = is_url(text) or Path(text).is_absolute() or text.startswith("~")
    return text.rstrip("/").rpartition("/")[2] if is_place else text


def markdown(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]], *, note: str) -> str:
    """A table as GitHub and the Hub show it."""
    lines = [["", *columns], ["---", *["---:"] * len(columns)], *([label, *map(str, cells)] for label, cells in rows)]
    table = "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n\n".join(part for part in (f"### {_plain(title)}", table, _plain(note)) if part)


def _plain(text: str) -> str:
    """Names come from files: in one line, and no HTML."""
    return printable(text).replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _reads_texts(model: nn.Module) -> bool:
    sizes: Any = model.config
    return sizes.caption_dim is not None
