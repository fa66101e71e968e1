"""Jobs that build on each other: each is done once, and again only when what it depends on has changed."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import Recipe, read_text, writing
from grpo.parallel import World, barrier, broadcast_object

MARKER = "phase.json"
GRID_NAME = "samples.png"  # beside the product of an evaluation


@dataclass(frozen=True)
class Phase:
    """One job among others."""

    title: str
    recipe: Recipe  # resolved, with the products of its inputs filled in
    job: Callable[[Recipe, World], None]  # does it, on every rank
    product: Path  # the file that it leaves behind, in a folder of its own
    inputs: Sequence[str] = ()  # names of the folders of the phases whose products it reads

    @property
    def folder(self) -> Path:
        """Of the product and of what else the job writes."""
        return self.product.parent

    @property
    def seconds(self) -> float:
        """That it took when it was done last."""
        return _read_marker(self.folder / MARKER).get("seconds", 0.0)


def run_phases(phases: Sequence[Phase], world: World, *, say: Callable[[str], None]) -> None:
    """Do the phases in their order. Collective.

    A finished phase whose recipe and inputs are the same as then is left as it is. What another recipe left in a
    phase's folder is moved to `previous/` beside it. An interrupted phase is done again; a training job then goes on
    from its newest checkpoint. `say` shows a line to the user.
    """
    keys: dict[str, str] = {}
    for number, phase in enumerate(phases, 1):
        depends_on = [phase.recipe.to_toml(), *(keys[name] for name in phase.inputs)]
        key = keys[phase.folder.name] = hashlib.sha256("\n".join(depends_on).encode()).hexdigest()
        say(f"[{number}/{len(phases)}] {phase.title}")
        if broadcast_object(_prepare(phase, key) if world.is_main else None):
            say("      finished before, not done again")
            continue
        started = time.perf_counter()
        phase.job(phase.recipe, world)
        barrier()
        seconds = time.perf_counter() - started
        if world.is_main:
            done = {"key": key, "finished": True, "seconds": round(seconds, 1)}
            (phase.folder / MARKER).write_text(json.dumps(done) + "\n")
        say(f"      {seconds:.0f} s")


def _prepare(phase: Phase, key: str) -> bool:
    """Whether the phase is finished; if not, its folder is made ready."""
    folder, marker = phase.folder, phase.folder / MARKER
    with writing(folder, remedy="choose another folder"):
        before = _read_marker(marker)
        same = before.get("key") == key
        if same and before.get("finished") and phase.product.exists():
            return True
        if folder.exists() and not same:
            aside = folder.parent / "previous" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"key": key, "finished": False}) + "\n")
    return False


def _read_marker(path: Path) -> dict[str, Any]:
    """What a phase has noted; nothing, where there is no note or it was cut short."""
    try:
        note = json.loads(read_text(path)) if path.exists() else {}
    except (ValueError, RecursionError, OSError):
        return {}
    return note if isinstance(note, dict) else {}
