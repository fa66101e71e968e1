"""Every recipe of train_configs/ runs in miniature: here, or in the test that is named for it."""

import math
import re
from pathlib import Path

import pytest
from PIL import Image

from grpo.data import CodeFolder
from grpo.jobs import encode, generate
from grpo.models import Classifier, ClassifierConfig, save_weights
from tests.recipes.test_published import small  # noqa: F401, a fixture
from tests.vgg import save_vgg16

ROOT = Path(__file__).resolve().parents[2]
TRAINED = {
    "c2i_autoregressive": "train",
    "c2i_b_256": "train",
    "c2i_xl_384_lora": "train",
    "pretrain_7b_hsdp": "pretrain",
    "published/vapi_xxl_384_one_gpu": "train",
    "published/vapi_xxl_384_two_hosts": "train",
}
"""Recipe -> job, of the training recipes that run here."""
ELSEWHERE = {
    "c2i_classes_only|debug": "test_train_grpo.py",
    "own_classes/.*": "test_own_data.py",
    "published/(ar_grpo_xl_384|loo_fid_l_256|vapi_xl_384|vapi_xxl_384)": "test_published.py",
    "published/(cca|gft)_l_384|quickstart/(cca|distill)": "test_distill_finetune.py",
    "quickstart/(classifier_.*|evaluate|gft|grpo|grpo_vapi|pretrain|pretrain_more|tokenizer)": "test_quickstart.py",
    "quickstart_text/.*": "test_quickstart_text.py",
    "text/(ar_grpo_t2i_xl_256|vapi_t2i|ranke_t2i_xl_256|pretrain_stage[12])": "test_text_published.py",
    "text/debug_text": "test_text_runs.py",
    "text/(finetune|generate|geneval)": "test_text_page.py",
}
"""Pattern of recipes -> the test of this folder that runs them."""
HERE = {*TRAINED, "encode_imagenet", "quickstart/generate"}


def test_every_recipe_has_a_test_that_runs_it():
    folder = ROOT / "train_configs"
    for path in folder.rglob("*.toml"):
        name = path.relative_to(folder).with_suffix("").as_posix()
        tests = [test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, name)]
        assert len(tests) + (name in HERE) == 1, f"{name} has {tests}: let a test run it in miniature, and name it here"
    assert all((ROOT / "tests/recipes" / test).is_file() for test in ELSEWHERE.values())


@pytest.mark.parametrize("name", TRAINED)
def test_training(run_here, small, tmp_path, name):  # noqa: F811
    """Two steps, of which all but sizes is as the recipe says; Inductor and a GPU's memory are not tried."""
    classifier = Classifier(ClassifierConfig(width=8, num_classes=10))
    save_weights(tmp_path / "classifier.safetensors", classifier.state_dict(), config=classifier.config)
    sizes = {"--training.batch_size": 8, "--training.micro_batch_size": 2, "--compile.enabled": "false"}
    if TRAINED[name] == "train":
        sizes |= {"--rollout.batch_size": 2, "--rollout.num_generations": 4}
    recipe = (ROOT / "train_configs" / f"{name}.toml").read_text()
    if "reward.lpips" in recipe:
        sizes["--reward.lpips.backbone"] = save_vgg16(tmp_path / "vgg.pth")
    if "reward.class_log_prob" in recipe:
        sizes["--reward.class_log_prob.checkpoint"] = tmp_path / "classifier.safetensors"
    flags = [text for pair in sizes.items() for text in pair]
    lines = run_here(TRAINED[name], "--config", name, *small, *flags, "--metrics.run_dir", tmp_path / "run")
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert all(line["skipped_steps"] == 0 for line in lines)


def kept(flags, *sections):
    """Of flags and their values those of some sections."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [str(word) for pair in pairs if pair[0].startswith(sections) for word in pair]


def test_encoding(small, tmp_path):  # noqa: F811
    """Ten crops of each of two sizes."""
    for number, folder in enumerate(("n01440764", "n01443537")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (50, 40), (90 * number, 0, 60)).save(tmp_path / folder / "image.png")
    flags = ["--data.path", tmp_path, "--data.image_size", 32, "--encode.output", tmp_path / "codes"]
    encode.main(["--config", "encode_imagenet", *kept(small, "--tokenizer."), *map(str, flags)])
    codes = CodeFolder(tmp_path / "codes")
    assert codes.labels.tolist() == [0, 1]
    assert codes.row(1, 19).shape == (64,)


def test_generating(small, tmp_path):  # noqa: F811
    flags = ["--sampling.image_size", 32, "--output.num_images", 20, "--output.grid", tmp_path / "grid.png"]
    generate.main(["--config", "quickstart/generate", *kept(small, "--tokenizer.", "--model."), *map(str, flags)])
    assert (tmp_path / "grid.png").is_file()
