"""Weights & Biases and TensorBoard: what a run's observer gives them, and that a continued run goes on in them."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo.config import Metrics, UserError
from grpo.observe import RunObserver, SampleRow, trackers

RECIPE = 'job = "train"\n[training]\nsteps = 4\n[reward.lpips]\nweight = 0.5\n'


def observer(run_dir, *, main=True, start_step=0, **metrics):
    settings, sizes = Metrics(interval=2, image_interval=2, **metrics), {"total_steps": 6, "start_step": start_step}
    return RunObserver(run_dir, settings, recipe_text=RECIPE, title="GRPO", main=main, **sizes)


def run_steps(watching, steps, *, reward=0.0):
    for step in steps:
        watching.log(step, {"reward_mean": reward + step})
        if watching.wants_images(step):
            watching.images(step, [SampleRow(None, torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]), "seven")])


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize(
    ("key", "advice"), [("wandb", "pip install wandb"), ("tensorboard", r"pip install .*\[tensorboard\]")]
)
def test_a_package_that_is_missing_is_told_on_every_rank(tmp_path, monkeypatch, main, key, advice):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"metrics.{key} .*{advice}"):
        observer(tmp_path / "run", main=main, **{key: True})
    assert not (tmp_path / "run").exists()


class FakeWandb(ModuleType):
    """Records what it is given; the package itself starts a service and takes seconds."""

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
    with observer(tmp_path / "run", wandb=True) as watching:
        run_steps(watching, range(1, 5))
    assert [step for step, values in wandb.logged if "reward_mean" in values] == [2, 4]
    images = [(step, values["samples"]) for step, values in wandb.logged if "samples" in values]
    assert [step for step, _ in images] == [1, 2, 4]
    assert images[0][1][1] == "seven"
    assert wandb.finished == 1


def test_wandb_knows_the_recipe_by_its_keys_and_where_the_run_belongs(tmp_path, wandb):
    names = {"wandb_project": "p", "wandb_entity": "team", "wandb_group": "sweep", "wandb_tags": ["a", "b"]}
    observer(tmp_path / "lr=1e-05", wandb=True, **names).close()
    given = wandb.inits[0]
    names = {"project": "p", "entity": "team", "name": "lr=1e-05", "group": "sweep", "tags": ["a", "b"]}
    assert {key: given[key] for key in names} == names
    assert (given["job_type"], given["mode"]) == ("train", "offline")
    assert given["config"] == {"job": "train", "training": {"steps": 4}, "reward": {"lpips": {"weight": 0.5}}}


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


def test_wandb_itself_takes_all_of_it(tmp_path, monkeypatch):
    """The package, which then keeps nothing and asks no server."""
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    watching = observer(tmp_path / "run", wandb=True, wandb_group="sweep", wandb_tags=["a"])
    run_steps(watching, range(1, 3))
    assert package.run.config["reward"] == {"lpips": {"weight": 0.5}}
    watching.close()
    assert package.run is None


def events(run_dir):
    """What TensorBoard reads: rewards by step, steps with images, the recipe."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run_dir / trackers.EVENTS_NAME))
    found.Reload()
    rewards = [(event.step, event.value) for event in found.Scalars("reward_mean")]
    recipe = found.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()
    return rewards, [image.step for image in found.Images("samples")], recipe


def test_tensorboard_gets_metrics_at_the_interval_images_and_the_recipe(tmp_path):
    with observer(tmp_path, tensorboard=True) as watching:
        run_steps(watching, range(1, 5))
    rewards, images, recipe = events(tmp_path)
    assert rewards == [(2, 2.0), (4, 4.0)]
    assert images == [1, 2, 4]
    assert "[reward.lpips]" in recipe


def test_a_continued_run_has_no_step_twice_in_tensorboard(tmp_path):
    killed = observer(tmp_path, tensorboard=True)
    run_steps(killed, range(1, 5))
    killed.close()
    with observer(tmp_path, tensorboard=True, start_step=2) as watching:
        run_steps(watching, range(3, 7), reward=100.0)
    rewards, images, _ = events(tmp_path)
    assert rewards == [(2, 2.0), (4, 104.0), (6, 106.0)]
    assert images == [1, 2, 4, 6]


def test_a_new_run_in_an_old_folder_has_event_files_of_its_own(tmp_path):
    for reward in (0.0, 100.0):
        with observer(tmp_path, tensorboard=True) as watching:
            run_steps(watching, range(1, 3), reward=reward)
    assert events(tmp_path)[0] == [(2, 102.0)]
    assert events(tmp_path / "previous" / "1")[0] == [(2, 2.0)]


def test_a_tracker_that_does_not_start_is_told(tmp_path, wandb, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    told = r"metrics.wandb: Weights & Biases does not start: No API key configured.*; WANDB_MODE=offline"
    with pytest.raises(UserError, match=told):
        observer(tmp_path / "run", wandb=True).__enter__()
    (tmp_path / "run" / trackers.EVENTS_NAME).touch()
    with pytest.raises(UserError, match=r"metrics.tensorboard: .*tensorboard cannot be written: File exists"):
        observer(tmp_path / "run", tensorboard=True).__enter__()
