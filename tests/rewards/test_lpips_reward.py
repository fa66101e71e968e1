"""The reward of LPIPS: minus the distance, real images looked at once, and its file."""

import pytest
import torch

from grpo.config import Compile, GRPORecipe, Rewards, UserError, load_recipe
from grpo.models import ClassCondition, load_lpips
from grpo.rewards import DecodedBatch, RewardContext, RewardSum, Term, build_rewards
from grpo.rewards.lpips import PerceptualSimilarity
from tests.vgg import save_vgg16

KIND = "lpips"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(save_vgg16(tmp_path_factory.mktemp("vgg") / "vgg.pth"))


@pytest.fixture(scope="module")
def reward(file, context):
    return PerceptualSimilarity(PerceptualSimilarity.Settings(kind=KIND, backbone=file), context)


@pytest.fixture(scope="module")
def batch():
    """Four completions of two real images, ever farther from them."""
    generator = torch.Generator().manual_seed(0)
    real, noise = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(4, 3, 16, 16, generator=generator)
    image_of = torch.tensor([0, 0, 1, 1])
    images = real[image_of] + torch.tensor([0.0, 0.1, 0.3, 0.9]).view(-1, 1, 1, 1) * noise
    return DecodedBatch(images, torch.zeros(4, 16), ClassCondition(image_of), real, image_of)


def test_minus_the_distance_to_the_own_real_image(reward, file, batch):
    values = reward(batch)
    expected = load_lpips(file)(batch.images, batch.real_images[batch.image_of])
    torch.testing.assert_close(values, -expected)
    assert values[0] == 0
    assert (values.diff() < 0).all()


def test_low_precision_keeps_the_order(tokenizer, file, batch, reward):
    low = RewardContext(tokenizer, torch.device("cpu"), torch.bfloat16, "abcd")
    values = PerceptualSimilarity(PerceptualSimilarity.Settings(kind=KIND, backbone=file), low)(batch)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, reward(batch), rtol=0.05, atol=1e-3)
    assert (values.diff() < 0).all()


def test_features_of_a_real_image_are_computed_once(tokenizer, reward, monkeypatch):
    seen, features = [], reward.lpips.features
    monkeypatch.setattr(reward.lpips, "features", lambda images: seen.append(len(images)) or features(images))
    tokens = torch.randint(32, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    condition = ClassCondition(torch.zeros(2, dtype=torch.int64))
    RewardSum(tokenizer, {KIND: Term(reward)}, batch_size=0)(tokens, condition, torch.zeros(2, 3, 16, 16))
    assert seen == [2, 8]


def test_its_missing_file_is_told_with_the_others(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tables = {KIND: {}, "patchgan": {"checkpoint": "gone.pt"}, "off": {"kind": KIND, "weight": 0}}
    with pytest.raises(UserError) as error:
        build_rewards(Rewards(**tables), tokenizer, class_names="abcd", device=torch.device("cpu"), compile=Compile())
    perceptual, adversarial = error.value.problems
    assert perceptual.startswith("reward.lpips: LPIPS needs torchvision's VGG16, vgg16-397923af.pth: no file")
    assert str(tmp_path / "hub" / "checkpoints") in perceptual
    assert "`backbone`" in perceptual
    assert adversarial.startswith("reward.patchgan: gone.pt: no such file")


def test_it_is_missed_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ["--data.name", "synthetic", "--reward.lpips.weight", "1"]
    load_recipe(GRPORecipe, flags)
    with pytest.raises(
        UserError, match=r"reward\.lpips\.backbone: .*hub/checkpoints/vgg16-397923af\.pth does not exist"
    ):
        load_recipe(GRPORecipe, flags, needs_files=True)


def test_a_free_sample_has_no_real_image_to_be_like():
    flags = ["--data.name", "synthetic", "--reward.lpips.weight", "1", "--rollout.mode", "autoregressive"]
    with pytest.raises(UserError, match=r"reward.lpips.weight must be 0 with rollout.mode"):
        load_recipe(GRPORecipe, flags)


def test_images_that_are_too_small_are_told_at_the_start():
    flags = ["--data.name", "synthetic", "--reward.lpips.weight", "1", "--tokenizer.downsample_size", "8"]
    load_recipe(GRPORecipe, [*flags, "--data.image_size", "16"])
    with pytest.raises(UserError) as error:
        load_recipe(GRPORecipe, [*flags, "--data.image_size", "8"])
    (line,) = error.value.problems
    assert line.endswith("reward.lpips: LPIPS needs data.image_size of at least 16, not 8")
