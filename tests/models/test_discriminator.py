"""The PatchGAN discriminator: LlamaGen's layout, strictly read; sizes from arguments or from our own files."""

import argparse

import pytest
import torch
from torch import nn

from grpo.config import UserError
from grpo.models import Discriminator, DiscriminatorConfig, load_discriminator, save_weights

LLAMAGENS = {  # name -> shape, of its discriminator with 3 layers of width 64
    "main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,),
    "main.2.weight": (128, 64, 4, 4), "main.5.weight": (256, 128, 4, 4), "main.8.weight": (512, 256, 4, 4),
    "main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,),
} | {
    f"main.{place}.{name}": (channels,) if name != "num_batches_tracked" else ()
    for place, channels in ((3, 128), (6, 256), (9, 512))
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}  # fmt: skip
SMALL = DiscriminatorConfig(width=4, num_layers=2)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Discriminator(SMALL)
    model(torch.rand(4, 3, 32, 32))  # moves the running statistics
    return model.eval()


def tokenizer_checkpoint(model, **more):
    return {"model": {"other": torch.ones(1)}, "discriminator": model.state_dict(), "steps": 3, **more}


def test_layout_and_initial_weights_are_llamagens():
    model = Discriminator(DiscriminatorConfig())
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == LLAMAGENS
    assert model.main[5].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.main[9].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert [layer.stride[0] for layer in model.main if isinstance(layer, nn.Conv2d)] == [2, 2, 2, 1, 1]
    assert model(torch.zeros(2, 3, 32, 48)).shape == (2, 1, 2, 4)


def test_logits_by_hand(small):
    """Written out, with the running statistics."""
    images = torch.rand(2, 3, 32, 32)
    w = small.state_dict()
    x = nn.functional.leaky_relu(nn.functional.conv2d(images, w["main.0.weight"], w["main.0.bias"], 2, 1), 0.2)
    for conv, norm, stride in ((2, 3, 2), (5, 6, 1)):
        x = nn.functional.conv2d(x, w[f"main.{conv}.weight"], None, stride, 1)
        mean, variance, scale, shift = (
            w[f"main.{norm}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = nn.functional.leaky_relu((x - mean) / (variance + 1e-5).sqrt() * scale + shift, 0.2)
    expected = nn.functional.conv2d(x, w["main.8.weight"], w["main.8.bias"], 1, 1)
    torch.testing.assert_close(small(images), expected, rtol=1e-4, atol=1e-5)


def test_read_from_a_checkpoint_of_tokenizer_training(tmp_path, small):
    checkpoint = tokenizer_checkpoint(small, args=argparse.Namespace(disc_dim=4), optimizer={"state": {}})
    torch.save(checkpoint, tmp_path / "vq.pt")
    loaded = load_discriminator(tmp_path / "vq.pt", SMALL)
    assert not loaded.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), small(images))


def test_own_weights_carry_their_sizes(tmp_path, small):
    save_weights(tmp_path / "d.safetensors", small.state_dict(), config=SMALL)
    loaded = load_discriminator(tmp_path / "d.safetensors")
    assert loaded.config == SMALL
    assert all(torch.equal(weight, small.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_llamagens_sizes_without_any(tmp_path):
    model = Discriminator(DiscriminatorConfig())
    torch.save(tokenizer_checkpoint(model), tmp_path / "vq.pt")
    assert load_discriminator(tmp_path / "vq.pt").config == DiscriminatorConfig(width=64, num_layers=3)


def test_other_files_are_refused(tmp_path, small):
    """Above all one that has weights, but none of a discriminator."""
    torch.save({"model": small.state_dict()}, tmp_path / "generator.pt")
    with pytest.raises(UserError, match=r"generator.pt: this checkpoint does not hold .* the key discriminator"):
        load_discriminator(tmp_path / "generator.pt", SMALL)
    torch.save({"discriminator": {1: torch.zeros(2)}}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match=r"numbers.pt: this checkpoint has a tensor by the name 1, which is no text"):
        load_discriminator(tmp_path / "numbers.pt")
    deep = DiscriminatorConfig(width=4, num_layers=100_000)
    save_weights(tmp_path / "deep.safetensors", small.state_dict(), config=deep)
    with pytest.raises(UserError, match=r"deep.safetensors: damaged, .* no sizes of a discriminator"):
        load_discriminator(tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="is a folder; give the file with the discriminator"):
        load_discriminator(tmp_path)
    torch.save(tokenizer_checkpoint(small), tmp_path / "vq.pt")
    differ = r"not the weights of a PatchGAN .* width 64 and 3 layers: they look like those of width 4 and 2 layers"
    with pytest.raises(UserError, match=differ):
        load_discriminator(tmp_path / "vq.pt")
    weights = small.state_dict()
    del weights["main.3.running_var"]
    torch.save({"discriminator": weights}, tmp_path / "incomplete.pt")
    with pytest.raises(UserError, match=r"incomplete.pt: not the weights of a PatchGAN"):
        load_discriminator(tmp_path / "incomplete.pt", SMALL)


@pytest.mark.parametrize(("layers", "side"), [(2, 12), (3, 24)])
def test_smallest_images(layers, side):
    model = Discriminator(DiscriminatorConfig(width=2, num_layers=layers)).eval()
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=f"at least {side} pixels each way"):
        model(torch.zeros(1, 3, side, side - 1))
