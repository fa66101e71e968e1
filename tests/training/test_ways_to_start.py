"""Every way to start a run again, walked through: continue, start anew, or refuse with one line; nothing is touched.

The decision is `find_checkpoint`'s, on real checkpoints of a small model; `test_resume.py` does some of the cells as
whole runs, tests/faults those that take torchrun and other numbers of ranks.
"""

import shutil
from pathlib import Path

import pytest

from grpo.checkpoint import CheckpointManager
from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.parallel import distributed
from grpo.training.resume import canonical, find_checkpoint
from tests.checkpoint.training import managed, start
from tests.parallel.torchrun import run_two_ranks

ANEW, REFUSED = "anew", "refused"
BY_LAUNCHER, REQUEUED = {"TORCHELASTIC_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}
HOW = {"first or by hand": {}, "by the launcher": BY_LAUNCHER, "requeued": REQUEUED,
       "launched again by hand, after restarts before": {"TORCHELASTIC_RESTART_COUNT": "0"}}  # fmt: skip

# What the run's own folder holds: checkpoints by step, and the one that the run had been told to go on from.
NOTHING, OWN, BRANCH = ((), None), ((1, 2, 3), None), ((5, 6), "other/step-000004")

# checkpoint.resume, the folder -> what happens after a start by hand and after one by a launcher or a queue.
TABLE = [
    ("auto", NOTHING, ANEW, ANEW),
    ("auto", OWN, "run/step-000003", "run/step-000003"),
    ("auto", BRANCH, "run/step-000006", "run/step-000006"),
    ("none", NOTHING, ANEW, ANEW),
    ("none", OWN, REFUSED, "run/step-000003"),
    ("none", BRANCH, REFUSED, "run/step-000006"),
    ("other/step-000004", NOTHING, "other/step-000004", "other/step-000004"),
    ("other/step-000004", OWN, REFUSED, REFUSED),
    ("other/step-000004", BRANCH, "run/step-000006", "run/step-000006"),
    ("other/step-000005", BRANCH, REFUSED, REFUSED),
    ("run/step-000002", OWN, REFUSED, REFUSED),
    ("run/step-000003", OWN, "run/step-000003", "run/step-000003"),
    ("run/step-000006", BRANCH, "run/step-000006", "run/step-000006"),
    ("run/step-000009", OWN, REFUSED, REFUSED),  # is not there
    ("other/step-000009", NOTHING, REFUSED, REFUSED),
]


@pytest.fixture(scope="module")
def world():
    with distributed(60) as world:
        yield world


def write(folder: Path, world, step: int, origin: str | None) -> Path:
    model, optimizer = start(world)
    with managed(folder, world) as manager:
        manager.save(step, model=model, optimizer=optimizer, run_state={"step": step, "resumed_from": origin})
    return folder / f"step-{step:06d}"


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    """What the run's folder may hold -> a folder with run/ and other/."""
    made = {}
    for steps, origin in (NOTHING, OWN, BRANCH):
        root = made[steps] = tmp_path_factory.mktemp("start")
        (root / "run").mkdir()
        for step in steps:
            write(root / "run", world, step, origin and canonical(str(root / origin)))
        for step in (4, 5):
            write(root / "other", world, step, None)
    return made


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("resume", "held", "by_hand", "restarted"), TABLE)
def test_every_way(world, folders, monkeypatch, resume, held, by_hand, restarted, how):
    root = folders[held[0]]
    for name, value in HOW[how].items():
        monkeypatch.setenv(name, value)
    expected = restarted if HOW[how] in (BY_LAUNCHER, REQUEUED) else by_hand
    before = tree(root)
    assert decide(root, resume, world) == expected
    assert tree(root) == before


def decide(root: Path, resume: str, world) -> str:
    """What a start does: refused, anew, or the checkpoint."""
    place = resume if resume in ("auto", "none") else root / resume
    flags = ["--config", "debug", "--checkpoint.dir", root / "run", "--checkpoint.resume", place]
    recipe = load_recipe(GRPORecipe, [str(flag) for flag in flags])
    manager = CheckpointManager(recipe.checkpoint_dir, world=world, config=recipe.checkpoint, timeout_seconds=60)
    try:
        path, named = find_checkpoint(recipe, manager, lambda line: pytest.fail(line))
    except UserError as error:
        (line,) = error.problems
        assert "\n" not in line
        return REFUSED
    finally:
        manager.close()
    assert named == (path is not None and path == place)
    return ANEW if path is None else str(path.relative_to(root))


def tree(root: Path) -> dict[str, int]:
    return {str(file.relative_to(root)): file.stat().st_mtime_ns for file in root.rglob("*")}


def test_a_damaged_newest_one_changes_no_outcome(world, folders, tmp_path):
    """The one before takes its place; a folder with nothing whole left is a first start."""
    for steps in ((3,), (2, 3), (1, 2, 3)):
        root = tmp_path / f"{len(steps)}"
        shutil.copytree(folders[(1, 2, 3)], root)
        for step in steps:
            (root / f"run/step-{step:06d}/run_state.json").write_text("{}")
        lines: list[str] = []
        recipe = load_recipe(GRPORecipe, ["--config", "debug", "--checkpoint.dir", str(root / "run")])
        manager = CheckpointManager(recipe.checkpoint_dir, world=world, config=recipe.checkpoint, timeout_seconds=60)
        path, _ = find_checkpoint(recipe, manager, lines.append)
        manager.close()
        assert len(lines) == len(steps)
        assert path == (root / f"run/step-{3 - len(steps):06d}" if len(steps) < 3 else None)


def test_hosts_that_count_their_restarts_differently_decide_alike(folders, tmp_path):
    """A host that came back counts from zero; one restart seen anywhere is a restart."""
    shutil.copytree(folders[(1, 2, 3)] / "run", tmp_path / "run")
    result = run_two_ranks("tests/training/start_on_two_hosts.py", tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_batch_is_the_same_on_any_number_of_ranks(ranks):
    """Sizes in a recipe are those of all ranks together."""
    recipe = load_recipe(GRPORecipe, ["--config", "debug", "--rollout.batch_size", "8", "--training.batch_size", "32"])
    schedule, alone = (recipe.schedule(ranks=count) for count in (ranks, 1))
    assert schedule.completions * ranks == alone.completions == 32
    assert schedule.steps_per_rollout == alone.steps_per_rollout


@pytest.mark.parametrize("ranks", [3, 5, 16])
def test_ranks_that_cannot_share_a_batch_are_refused(ranks):
    recipe = load_recipe(GRPORecipe, ["--config", "debug", "--rollout.batch_size", "8", "--training.batch_size", "32"])
    with pytest.raises(UserError, match=r"rollout\.batch_size"):
        recipe.schedule(ranks=ranks)
