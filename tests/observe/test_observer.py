"""RunObserver: what is in a run's folder, who writes it, Weights & Biases."""

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo.config import Metrics, UserError
from grpo.observe import RunObserver, SampleRow, read_metrics
from grpo.observe import observer as observer_module


def observer(run_dir, *, main=True, start_step=0, total_steps=4, **metrics):
    settings = Metrics(interval=2, image_interval=2, **metrics)
    return RunObserver(
        run_dir,
        settings,
        total_steps=total_steps,
        recipe_text="[training]\nsteps = 4\n",
        title="GRPO",
        main=main,
        start_step=start_step,
    )


def sample_rows():
    return [SampleRow(None, torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]), "seven")]


def run_steps(watching, steps):
    for step in steps:
        watching.log(step, {"loss": 0.5**step, "reward_mean": -1.0})
        if watching.wants_images(step):
            watching.images(step, sample_rows())


def test_grids_that_are_kept_are_spread_over_the_run(tmp_path):
    with observer(tmp_path, total_steps=200, keep_grids=8) as watching:
        run_steps(watching, range(1, 201))
    steps = [int(path.stem.removeprefix("step-")) for path in sorted((tmp_path / "samples").iterdir())]
    assert len(steps) == 8
    assert (steps[0], steps[-1]) == (1, 200)
    assert max(after - before for before, after in pairwise(steps)) <= 2 * 200 / 7


def test_a_run_leaves_its_folder(tmp_path):
    with observer(tmp_path / "run") as watching:
        run_steps(watching, range(1, 5))
        watching.message("a note")
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    samples = {f"samples/step-{step:06d}.png" for step in (1, 2, 4)}
    assert names == {"recipe.toml", "metrics.jsonl", "log.txt", "report.html", *samples}
    assert [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0.5, 0.25, 0.125, 0.0625]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "GRPO 2/4  reward -1  loss 0.25" in log
    assert "GRPO 1/4" not in log
    assert "a note" in log
    assert log.endswith("finished at step 4\n")
    assert "finished, step 4 of 4" in (tmp_path / "run" / "report.html").read_text()


def test_a_new_run_overwrites_nothing(tmp_path):
    for loss_lines in (4, 2, 1):
        with observer(tmp_path, total_steps=loss_lines) as watching:
            assert read_metrics(tmp_path / "metrics.jsonl") == []
            run_steps(watching, range(1, loss_lines + 1))
            (tmp_path / "model.safetensors").write_text(f"weights of {loss_lines}")
    for folder, loss_lines in (("previous/1", 4), ("previous/2", 2), ("", 1)):
        assert len(read_metrics(tmp_path / folder / "metrics.jsonl")) == loss_lines
        assert (tmp_path / folder / "model.safetensors").read_text() == f"weights of {loss_lines}"
        assert len(list((tmp_path / folder / "samples").iterdir())) == {4: 3, 2: 2, 1: 1}[loss_lines]


def test_a_recipe_of_the_users_in_the_runs_folder_is_kept(tmp_path):
    (tmp_path / "recipe.toml").write_text("# mine\n")
    for _ in range(2):  # the second start has nothing to move
        observer(tmp_path)
    assert [path.read_text() for path in tmp_path.glob("previous/*/recipe.toml")] == ["# mine\n"]


def test_garbage_in_the_metrics_and_names_from_anywhere_do_not_stop_a_run(tmp_path):
    with observer(tmp_path) as watching:
        run_steps(watching, range(1, 3))
    huge = "9" * 400
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(
            f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in ((f"-{huge}", 1), (1, huge), (1, "[]"))
        )
    with observer(tmp_path, start_step=2) as watching:
        run_steps(watching, range(3, 5))
        watching.message("step-000002 is damaged: \udcff\x1b[2J")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert r"is damaged: \udcff\x1b[2J" in (tmp_path / "log.txt").read_text()


def test_a_run_that_stops_says_why(tmp_path):
    def stopped():
        with observer(tmp_path) as watching:
            run_steps(watching, [1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / "log.txt").read_text().endswith("stopped by KeyboardInterrupt at step 1\n")
    assert "stopped by KeyboardInterrupt, step 1 of 4" in (tmp_path / "report.html").read_text()


def test_a_continued_run_goes_on_in_the_same_files(tmp_path):
    with observer(tmp_path) as watching:
        run_steps(watching, range(1, 4))
    with observer(tmp_path, start_step=2) as watching:
        run_steps(watching, range(3, 5))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "log.txt").read_text().count("GRPO: from step") == 2


def test_other_ranks_write_nothing(tmp_path):
    with observer(tmp_path / "run", main=False) as watching:
        run_steps(watching, range(1, 5))
        watching.message("a note")
    assert not (tmp_path / "run").exists()


def test_images_are_due_at_the_interval_and_at_both_ends(tmp_path):
    watching = observer(tmp_path, main=False, total_steps=7)
    assert [step for step in range(1, 8) if watching.wants_images(step)] == [1, 2, 4, 6, 7]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to the run's folder .*run: .*; set metrics.run_dir"):
        observer(tmp_path / "run")


@pytest.mark.parametrize("main", [True, False])
def test_wandb_that_is_missing_is_told_on_every_rank(tmp_path, monkeypatch, main):
    monkeypatch.setattr(observer_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        observer(tmp_path / "run", main=main, wandb=True)
    assert not (tmp_path / "run").exists()


class FakeWandb(ModuleType):
    """Records what it is given; stands in for the package, which not every machine has."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.inits, self.logged, self.finished = [], [], 0
        self.run = SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=self.finish)

    def init(self, **arguments):
        self.inits.append(arguments)
        return self.run

    def finish(self):
        self.finished += 1

    def Image(self, image, caption):
        return image.size, caption


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_gets_metrics_at_the_interval_and_captioned_images(tmp_path, wandb):
    with observer(tmp_path / "run", wandb=True, wandb_project="p", wandb_entity="team") as watching:
        run_steps(watching, range(1, 5))
    assert [step for step, values in wandb.logged if "loss" in values] == [2, 4]
    images = [(step, values["samples"]) for step, values in wandb.logged if "samples" in values]
    assert [step for step, _ in images] == [1, 2, 4]
    assert images[0][1][1] == "seven"
    assert wandb.finished == 1
    arguments = wandb.inits[0]
    assert (arguments["project"], arguments["entity"], arguments["name"]) == ("p", "team", "run")
    assert arguments["mode"] == "offline"


def test_a_continued_run_keeps_its_wandb_id(tmp_path, wandb):
    for start_step in (0, 2):
        observer(tmp_path, wandb=True, start_step=start_step).close()
    first, second = wandb.inits
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled")],
)
def test_the_environment_decides_whether_wandb_is_online(tmp_path, wandb, monkeypatch, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    observer(tmp_path, wandb=True).close()
    assert wandb.inits[0]["mode"] == mode
