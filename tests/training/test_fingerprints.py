"""What a run depends on besides its recipe changes while it is stopped: told, and refused unless it was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import GRPORecipe, PretrainRecipe, TokenizerRecipe, UserError, load_recipe
from grpo.jobs.train_grpo import main as train
from grpo.models import VQModel, save_weights, tokenizer_sizes
from tests.training.test_resume import starts


@pytest.fixture
def job(tmp_path):
    """The debugging recipe on a folder of two classes, with a tokenizer in a file: run(steps, *flags)."""
    for name in ("birds", "cats"):
        draw_class(tmp_path, name)
    write_tokenizer(tmp_path, seed=0)
    flags = ["--config", "debug", "--metrics.image_interval", 0, "--data.name", "folder", "--data.num_workers", 0,
             "--metrics.run_dir", tmp_path / "run"]  # fmt: skip

    def run(steps, *more, images="images", vq="vq.safetensors"):
        files = ["--data.path", tmp_path / images, "--tokenizer.checkpoint", tmp_path / vq]
        train([str(text) for text in (*flags, *files, "--training.steps", steps, *more)])

    return run


def draw_class(folder, name, images=2):
    path = folder / "images" / "train" / name
    path.mkdir(parents=True)
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")


def write_tokenizer(folder, seed):
    torch.manual_seed(seed)
    model = VQModel(tokenizer_sizes(load_recipe(GRPORecipe, ["--config", "debug"]).tokenizer))
    save_weights(folder / "vq.safetensors", model.state_dict(), config=model.config)


def test_other_weights_under_the_same_path(tmp_path, job):
    job(1)
    write_tokenizer(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"differ \(1 keys\)") as error:
        job(2)
    assert error.value.problems[1] == "tokenizer.checkpoint: other contents since the checkpoint was written"
    job(2, "--checkpoint.resume", tmp_path / "run/checkpoints/step-000001")
    log = (tmp_path / "run/log.txt").read_text()
    assert "changed since then: tokenizer.checkpoint: other contents" in log
    assert starts(tmp_path / "run") == [0, 1]
    job(3)  # from then on these are the run's


def test_the_same_weights_elsewhere_are_the_same(tmp_path, job):
    job(1)
    (tmp_path / "vq.safetensors").rename(tmp_path / "moved.safetensors")
    (tmp_path / "images").rename(tmp_path / "pictures")
    job(2, images="pictures", vq="moved.safetensors")
    assert starts(tmp_path / "run") == [0, 1]


def test_a_class_folder_in_front_shifts_the_labels(tmp_path, job):
    job(1)
    draw_class(tmp_path, "ants")
    with pytest.raises(UserError, match=r"differ \(1 keys\)") as error:
        job(2)
    assert error.value.problems[1] == "data: files, labels since the checkpoint was written"


def test_a_checkpoint_of_another_format_is_refused(tmp_path, job):
    from grpo.formats import file_sums, manifest_text, read_manifest, read_weights

    job(1)
    folder = tmp_path / "run/checkpoints/step-000001"
    file = folder / "run_state.json"
    state = json.loads(file.read_text())
    assert state["format"] == 1
    file.write_text(json.dumps({**state, "format": 2}))
    (folder / "manifest.json").write_text(manifest_text({**read_manifest(folder), **file_sums([file])}))
    with pytest.raises(UserError, match=r"run_state\.json: the checkpoint has format 2, this version .* reads 1"):
        job(2)
    assert read_weights(folder)  # tensors are tensors
    assert starts(tmp_path / "run") == [0]


def files(recipe_class, *flags):
    return load_recipe(recipe_class, [str(flag) for flag in flags]).files_of_every_start()


def test_files_of_every_start(tmp_path):
    """Weights that training changes are not among them, unless something else reads them too."""
    published = Path("train_configs/published/vapi_xxl_384.toml")
    named = files(GRPORecipe, "--config", published)
    assert "tokenizer.checkpoint" in named
    assert "data.path" not in named
    assert "model.checkpoint" not in named
    assert "model.checkpoint" in files(GRPORecipe, "--config", published, "--objective.kl", "k3")
    reference = ["--objective.kl", "k3", "--objective.reference_checkpoint", "reference.pt"]
    with_reference = files(GRPORecipe, "--config", published, *reference)
    assert with_reference["objective.reference_checkpoint"] == "reference.pt"
    assert "model.checkpoint" not in with_reference
    judge = ["--reward.aesthetic.checkpoint", "a.pth", "--reward.aesthetic.clip_checkpoint", "clip"]
    assert {"reward.aesthetic.checkpoint", "reward.aesthetic.clip_checkpoint"} <= files(
        GRPORecipe, "--config", published, *judge
    ).keys()
    assert (
        not {"reward.aesthetic.checkpoint"}
        & files(GRPORecipe, "--config", published, *judge, "--reward.aesthetic.weight", "0").keys()
    )
    beginning = files(PretrainRecipe, "--config", "quickstart/pretrain", "--model.checkpoint", "x")
    assert beginning.keys() == {"tokenizer.checkpoint"}
    assert files(TokenizerRecipe, "--config", "quickstart/tokenizer", "--tokenizer.checkpoint", "x") == {}
    idle = ["--judge.feature_checkpoint", "gone", "--judge.interval", 0]
    assert "judge.feature_checkpoint" not in files(GRPORecipe, "--config", "debug", *idle)


def test_the_backbone_of_lpips_is_one_of_them(tmp_path, monkeypatch):
    """Whether a key names it or it lies where torch keeps its downloads."""
    tokenizer = ["--config", "quickstart/tokenizer", "--tokenizer_loss.perceptual_weight", 1]
    for flags, key in (
        (["--config", "debug", "--reward.lpips.weight", 1], "reward.lpips.backbone"),
        (
            tokenizer,
            "tokenizer_loss.perceptual_backbone",
        ),
    ):
        recipe = TokenizerRecipe if flags is tokenizer else GRPORecipe
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        assert files(recipe, *flags)[key] == str(tmp_path / "hub/checkpoints/vgg16-397923af.pth")
        monkeypatch.delenv("TORCH_HOME")
        assert files(recipe, *flags)[key] == f"{torch.hub.get_dir()}/checkpoints/vgg16-397923af.pth"
        assert files(recipe, *flags, f"--{key}", "mine.pth")[key] == "mine.pth"
