"""The reference of all keys: `--help` of a job, and the page docs/configuration.md for all jobs."""

import textwrap

from grpo.config.flags import reference_flags
from grpo.config.keys import Key, recipe_keys
from grpo.config.recipes import RECIPES, GRPORecipe, Recipe
from grpo.config.sections import Section

WIDTH = 110

INTRODUCTION = """\
# Configuration

This page is generated: `python -m grpo.config > docs/configuration.md`.

A job is a script in `recipes/`; its recipe is a TOML file of sections, one typed key a line. The file says by `job`
which script runs it:

```toml
job = "grpo"

[rollout]
mode = "autoregressive"
num_generations = 8
```

- `--config FILE` names the recipe; without it every key has its default.
- `--section.key VALUE` or `--section.key=VALUE` sets any key; it overrides the file, as the file overrides the default.
- A switch may stand alone (`--metrics.wandb`) or with `true` or `false`. A list is `1,2,3` on the command line.
- `none` stands for "not set", in the file (`"none"`) and on the command line.
- Paths are relative to the folder in which the script is started.
- `recipes/grpo.py` also takes the flags of the reference trainer, which are listed beside their keys.
- `--help` prints the keys of one job.

All mistakes are reported together, one line each, before anything is loaded: unknown names with the nearest valid one,
wrong types, values out of range, combinations that cannot work. Settings that have no effect are named in the log.
The resolved recipe is saved as `recipe.toml` in the run's folder and can be run again as it is.

A run's folder is `metrics.run_dir`, by default `runs/<name of the recipe file>`. Checkpoints are in `checkpoints/`
inside it, unless `checkpoint.dir` names another folder.

## Sizes of a batch in GRPO

All sizes are those of one rank. A rollout draws `rollout.num_generations` (G) completions of each of
`rollout.batch_size` (B) images. An optimizer step takes S = `training.batch_size` x
`training.gradient_accumulation_steps` completions. S must divide B x G, and be a multiple or a divisor of G. With
S = B x G each rollout feeds one optimizer step: the fastest setting, and exactly on-policy.
"""


def help_text(recipe_class: type[Recipe]) -> str:
    """Every key of a job by section, with its flags, the values it takes, its default and its meaning."""
    lines = [
        recipe_class.__doc__,
        "",
        f"usage: recipes/{recipe_class.job}.py [--config FILE] [--section.key VALUE ...]",
        "A flag overrides the recipe file, the file overrides the default.",
    ]
    keys, reference = recipe_keys(recipe_class).values(), reference_flags(recipe_class)
    for section_name, section in recipe_class.sections().items():
        lines += ["", f"[{section_name}] {_section_title(section)}"]
        for key in keys:
            if key.section == section_name:
                flags = ", ".join(filter(None, [f"--{key.name}", reference.get(key.name)]))
                lines.append(f"  {flags}  ({key.allowed}; default {key.default})")
                lines += textwrap.wrap(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def markdown() -> str:
    """The page docs/configuration.md."""
    lines = [INTRODUCTION, "## Jobs", "", "| script | what it does | sections |", "|---|---|---|"]
    sections: dict[str, type[Section]] = {}
    keys: dict[str, Key] = {}
    for recipe_class in RECIPES.values():
        names = " ".join(f"`[{name}]`" for name in recipe_class.sections())
        lines.append(f"| `recipes/{recipe_class.job}.py` | {recipe_class.__doc__} | {names} |")
        sections |= recipe_class.sections()
        keys |= recipe_keys(recipe_class)
    reference = reference_flags(GRPORecipe)
    for section_name, section in sections.items():
        lines += ["", f"## [{section_name}]", "", _section_title(section), ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        for key in keys.values():
            if key.section == section_name:
                flag = f"<br>`{reference[key.name]}`" if key.name in reference else ""
                lines.append(f"| `{key.name}`{flag} | {key.allowed} | `{key.default}` | {key.meaning} |")
    return "\n".join(lines) + "\n"


def _section_title(section: type[Section]) -> str:
    return " ".join(section.__doc__.split())
