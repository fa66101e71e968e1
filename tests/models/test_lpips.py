"""LPIPS: equal to the package that defines it, its two halves, and what it says about files."""

import re

import lpips as package
import pytest
import torch

from grpo.config import UserError
from grpo.models import load_lpips
from grpo.models.lpips import BACKBONE
from tests.vgg import random_vgg16, save_vgg16


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_vgg16(tmp_path_factory.mktemp("vgg") / BACKBONE)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(3, 3, 32, 48, generator=generator) * 2 - 1
    return real + 0.3 * torch.randn(real.shape, generator=generator), real


@pytest.fixture(scope="module")
def model(file):
    return load_lpips(file)


def test_equals_the_package(model, images):
    defining = package.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False)
    weights = random_vgg16()
    for part in defining.net.children():
        for place, layer in part.named_children():
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(weights[f"features.{place}.{name}"])
    with torch.no_grad():
        expected = defining(*images).flatten()
        torch.testing.assert_close(model(*images), expected, rtol=1e-5, atol=1e-6)
    assert (expected > 0.01).all()


def test_features_of_real_images_are_found_once_and_shared(model, images):
    first, real = images
    image_of = torch.tensor([2, 0, 0, 1])
    distance = model.distance(model.features(first[[0, 1, 2, 0]]), model.features(real), image_of)
    torch.testing.assert_close(distance, model(first[[0, 1, 2, 0]], real[image_of]))


def test_an_image_is_at_distance_0_from_itself_with_a_finite_gradient(model, images):
    """Black images too, where features may be zero in all channels."""
    for image in (images[0][:1], torch.full((1, 3, 16, 16), -1.0)):
        moved = image.clone().requires_grad_()
        distance = model(moved, image)
        distance.sum().backward()
        assert distance.item() == 0
        assert moved.grad.isfinite().all()


def test_the_backbone_may_be_low_in_precision(file, images):
    low = load_lpips(file)
    exact = low(*images)
    low.backbone.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    distance = low(images[0].bfloat16(), images[1])
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, exact, rtol=0.05, atol=1e-3)


def test_found_where_torch_keeps_its_downloads(tmp_path, monkeypatch, model):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=re.escape(f"{BACKBONE}: no file {tmp_path / 'hub' / 'checkpoints' / BACKBONE};")
    ):
        load_lpips()
    save_vgg16(tmp_path / "hub" / "checkpoints" / BACKBONE)
    expected = model.backbone.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load_lpips().backbone.state_dict().items())


@pytest.mark.parametrize("change", [{"features.28.bias": None}, {"features.30.weight": torch.ones(1)}])
def test_other_weights_are_refused(tmp_path, change):
    weights = {name: weight for name, weight in (random_vgg16() | change).items() if weight is not None}
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=rf"vgg.pth: not the weights of torchvision's VGG16 .*{next(iter(change))}"):
        load_lpips(tmp_path / "vgg.pth")


def test_malformed_weights_are_told(tmp_path):
    torch.save(random_vgg16() | {1: torch.ones(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"vgg.pth: this checkpoint has a tensor by the name 1, which is no text"):
        load_lpips(tmp_path / "vgg.pth")
    torch.save(random_vgg16() | {"features.28.bias": torch.full((512,), float("nan"))}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"vgg.pth: features.28.bias holds NaN or infinite numbers"):
        load_lpips(tmp_path / "vgg.pth")


def test_missing_files_are_named(tmp_path, file, monkeypatch):
    with pytest.raises(UserError, match=r"LPIPS needs torchvision's VGG16, .* no file .*gone.pth; check the path"):
        load_lpips(tmp_path / "gone.pth")
    monkeypatch.setattr("grpo.models.lpips.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package lpips, which is not installed: pip install lpips"):
        load_lpips(file)


def test_small_images_are_refused(model):
    with pytest.raises(UserError, match="at least 16 pixels each way, not 16 x 15"):
        model.features(torch.zeros(1, 3, 15, 16))
