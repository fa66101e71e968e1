"""The reward of a discriminator: its mean logit, its sizes and its file."""

import pytest
import torch

from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.models import ClassCondition, Discriminator, DiscriminatorConfig, save_weights
from grpo.rewards import DecodedBatch, RewardContext
from grpo.rewards.patchgan import PatchGAN

SMALL = DiscriminatorConfig(width=4, num_layers=2)


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return Discriminator(SMALL).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory, discriminator):
    """Our own file, with its sizes, and one as LlamaGen's trainer writes it."""
    folder = tmp_path_factory.mktemp("discriminator")
    own, other = folder / "discriminator.safetensors", folder / "vq.pt"
    save_weights(own, discriminator.state_dict(), config=SMALL)
    torch.save({"model": {}, "discriminator": discriminator.state_dict()}, other)
    return str(own), str(other)


def settings(**keys):
    return PatchGAN.Settings(kind="patchgan", **keys)


def test_mean_logit(files, discriminator, context):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    places = torch.arange(3)
    batch = DecodedBatch(images, torch.zeros(3, 64), ClassCondition(places), images, places)
    expected = discriminator(images).mean(dim=(1, 2, 3))
    torch.testing.assert_close(PatchGAN(settings(checkpoint=files[0]), context)(batch), expected)
    torch.testing.assert_close(PatchGAN(settings(checkpoint=files[1], dim=4, num_layers=2), context)(batch), expected)


def test_low_precision(tokenizer, files, discriminator):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    places = torch.arange(3)
    batch = DecodedBatch(images.bfloat16(), torch.zeros(3, 64), ClassCondition(places), images, places)
    low = RewardContext(tokenizer, torch.device("cpu"), torch.bfloat16, "abcd")
    values = PatchGAN(settings(checkpoint=files[0]), low)(batch)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, discriminator(images).mean(dim=(1, 2, 3)), rtol=0.05, atol=1e-3)


def test_sizes_that_are_not_those_of_the_file_are_told(files, context):
    with pytest.raises(UserError, match=r"of width 64 and 3 layers: they look like those of width 4 and 2 layers"):
        PatchGAN(settings(checkpoint=files[1]), context)
    with pytest.raises(UserError, match=r"of width 4 and 3 layers"):
        PatchGAN(settings(checkpoint=files[0], dim=4), context)


@pytest.mark.parametrize("switch", [["--reward-use-gan"], ["--reward.patchgan.weight", "2"]])
def test_it_is_not_on_without_its_file(switch, files):
    flags = ["--data.name", "synthetic", *switch]
    with pytest.raises(UserError) as error:
        load_recipe(GRPORecipe, flags)
    line = "reward.patchgan: checkpoint: is required, a file with the weights of a discriminator"
    assert error.value.problems == [line]
    table = load_recipe(GRPORecipe, [*flags, "--reward-disc-ckpt", files[0]]).reward.active["patchgan"]
    assert (table.checkpoint, table.weight) == (files[0], 2.0 if len(switch) > 1 else 1.0)


@pytest.mark.parametrize("sizes", [[], ["--reward.patchgan.num_layers", "3"]])
def test_images_that_are_too_small_are_told_at_the_start(sizes, tmp_path):
    """Of a file that says its sizes, and of a table that does."""
    config, path = DiscriminatorConfig(width=4, num_layers=3), str(tmp_path / "d.safetensors")
    save_weights(path, Discriminator(config).state_dict(), config=config)
    flags = ["--data.name", "synthetic", "--reward.patchgan.checkpoint", path, *sizes]
    load_recipe(GRPORecipe, [*flags, "--data.image_size", "32"])
    with pytest.raises(UserError) as error:
        load_recipe(GRPORecipe, [*flags, "--data.image_size", "16"])
    (line,) = error.value.problems
    assert line.endswith("reward.patchgan: a discriminator of 3 layers needs data.image_size of at least 24, not 16")


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--reward-disc-num-layers", "11", "reward.patchgan.num_layers"),
        ("--reward.patchgan.dim", "1025", "reward.patchgan.dim"),
        ("--reward.feature_distance.resize", "4097", "reward.feature_distance.resize"),
        ("--reward.loo_fid.crop", "1000000", "reward.loo_fid.crop"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused(flag, value, told):
    table = told.split(".")[1]
    flags = ["--data.name", "synthetic", f"--reward.{table}.checkpoint", "w.pt", flag, value]
    with pytest.raises(UserError) as error:
        load_recipe(GRPORecipe, flags)
    assert any(told in problem and "must be" in problem for problem in error.value.problems)
