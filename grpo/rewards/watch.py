"""Looks at the metrics of each step for rewards that keep silent, are not finite or hold up the run."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from grpo.rewards.base import Term

SLOW_SHARE = 0.5  # of a step's time


class Seen(NamedTuple):
    """What a step's metrics tell."""

    notes: list[str]  # to be told, each once in a run
    problem: str | None = None  # why the run must stop
    if_last: str | None = None  # why the run has failed if it ends with this step
    not_finite: tuple[str, ...] = ()  # the rewards of which this step has such a number, and where they are


class RewardWatch:
    """Called with the metrics of each step, the same on every rank but for times."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self._terms, self._steps = terms, 0
        self._bad_in_a_row: Counter[str] = Counter()
        self._told: set[str] = set()
        self._silent = dict.fromkeys(terms)  # who has had no opinion in any step

    def __call__(self, metrics: Mapping[str, float]) -> Seen:
        """What is to be told of this step."""
        self._steps += 1
        notes = [note for name in self._terms if (note := self._slow(name, metrics)) is not None]
        for name in [name for name in self._silent if metrics.get(f"reward/{name}_abstained", 0.0) < 1.0]:
            del self._silent[name]
        silent = ", ".join(_named(name, self._terms[name]) for name in self._silent)
        if_last = f"{silent}: had no opinion (NaN) in any step" if silent else None
        means = {name: metrics.get(f"reward/{name}_mean", 0.0) for name in self._terms}
        not_finite = tuple(_named(name, self._terms[name]) for name, mean in means.items() if not math.isfinite(mean))
        return self._abstaining(metrics, notes)._replace(if_last=if_last, not_finite=not_finite)

    def _abstaining(self, metrics: Mapping[str, float], notes: list[str]) -> Seen:
        """These notes, and what is to be told of rewards that abstain too often."""
        for name, term in self._terms.items():
            abstained, reward = metrics.get(f"reward/{name}_abstained", 0.0), term.reward
            if abstained < 1.0 and abstained <= reward.most_abstained:
                self._bad_in_a_row[name] = 0
                continue
            self._bad_in_a_row[name] += 1
            what = f"{_named(name, term)}: no opinion (NaN) of {abstained:.0%} of the completions of a step"
            if self._bad_in_a_row[name] >= reward.bad_steps:
                return Seen(notes, f"{what}, {reward.bad_steps} steps in a row; mend it, or set its weight to 0")
            if f"{name} abstains" not in self._told:
                self._told.add(f"{name} abstains")
                notes.append(f"{what}; the run stops after {reward.bad_steps} such steps in a row")
        return Seen(notes)

    def _slow(self, name: str, metrics: Mapping[str, float]) -> str | None:
        """A line about user code or a server that takes most of a step; not of the first, a warm-up."""
        term, seconds, step = self._terms[name], metrics.get(f"seconds/reward/{name}", 0.0), metrics["seconds/step"]
        if not term.reward.place or self._steps < 2 or seconds <= SLOW_SHARE * step or f"{name} slow" in self._told:
            return None
        self._told.add(f"{name} slow")
        return f"{_named(name, term)}: slow, it takes {seconds:.2f} of the {step:.2f} seconds of a step"


def _named(name: str, term: Term) -> str:
    return f"reward.{name}: {term.reward.place}" if term.reward.place else f"reward.{name}"
