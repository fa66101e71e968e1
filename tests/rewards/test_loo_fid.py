"""Leave-one-out FID by brute force, its first order by finite differences, its memory, and its reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.evaluation.distances import FeatureStatistics, frechet_distance
from grpo.models import Classifier, ClassifierConfig, save_weights
from grpo.rewards.loo_fid import Gaussian, LeaveOneOutFID, first_order, moments

D = 6


def drawn(count, seed=0):
    """Features [count, D] fp64 with correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return torch.randn(count, D, generator=generator, dtype=torch.float64) @ mix + 0.3 * seed


@pytest.fixture
def build(tmp_path, context):
    """Keys of the table -> the reward, of a network that sees 32 features; `feed` gives it others."""
    torch.manual_seed(0)
    path = tmp_path / "c.safetensors"
    save_weights(path, Classifier(ClassifierConfig(width=8, num_classes=4)).state_dict())

    def build(*, features=None, context=context, **keys):
        settings = LeaveOneOutFID.Settings(
            kind="loo_fid", net="classifier", checkpoint=str(path), reference=keys.pop("reference", None),
            **keys,
        )  # fmt: skip
        reward = LeaveOneOutFID(settings, context)
        if features is not None:  # as if the network had D features
            reward.reference = moments(features, full=reward.full)[0]
            reward._memory = Gaussian(*(torch.zeros_like(moment) for moment in reward.reference))
        return reward

    return build


@pytest.fixture
def npz(tmp_path):
    """Statistics of 32 features."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(50, 32))
    path = tmp_path / "reference.npz"
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return str(path)


def distance(weights, features, real):
    """Fréchet distance of diagonal Gaussians: of weighted features, and of real ones with equal weights."""
    weights = weights / weights.sum()
    mean = weights @ features
    variance = weights @ (features - mean).square()
    spread = (variance.sqrt() - real.var(dim=0, correction=0).sqrt()).square()
    return ((mean - real.mean(dim=0)).square() + spread).sum()


@pytest.mark.parametrize("keep", [0.0, 0.9])
def test_diagonal_is_the_brute_force_difference(build, npz, keep):
    """Three steps; the memory is a weighting of all samples so far, and n what equal weights of the last would be."""
    real, steps = drawn(400), [drawn(12, seed) for seed in (1, 2, 3)]
    reward = build(features=real, reference=npz, memory=keep)
    for number, features in enumerate(steps):
        found = reward.score(features)
        shares = torch.tensor([keep ** (number - step) * (1 - keep) for step in range(number + 1)]).double()
        shares = shares / shares.sum()
        so_far = torch.cat(steps[: number + 1])
        whole = shares.repeat_interleave(12) / 12
        expected = []
        for i in range(12):
            without = whole.clone()
            without[-12:] = shares[-1] / 11
            without[-12 + i] = 0.0
            expected.append(distance(without, so_far, real) - distance(whole, so_far, real))
        torch.testing.assert_close(found.double(), torch.stack(expected) * 12 / shares[-1], rtol=1e-6, atol=1e-9)


def test_full_is_the_derivative_of_the_distance(build, npz):
    """Of frechet_distance, by the weight of each sample; and the sign is that of the exact difference."""
    real, features = drawn(400), drawn(40, 1)
    reference = Gaussian(real.mean(0), torch.cov(real.T, correction=0))

    def fid(weights):
        mean = weights @ features
        centred = features - mean
        covariance = centred.T @ (weights[:, None] * centred)
        return frechet_distance(FeatureStatistics(mean, covariance), FeatureStatistics(*reference))

    equal, step = torch.full((40,), 1 / 40, dtype=torch.float64), 1e-5
    influence = first_order(features, moments(features, full=True)[0], reference)
    for i in range(40):
        towards = -equal  # from all to all but i, at rate 1
        towards = towards + torch.nn.functional.one_hot(torch.tensor(i), 40).double()
        slope = (fid(equal + step * towards) - fid(equal - step * towards)) / (2 * step)
        assert slope == pytest.approx(influence[i].item() - influence.mean().item(), rel=1e-5, abs=1e-6)
    reward = build(features=real, reference=npz, covariance="full", memory=0.0)
    exact = torch.tensor(
        [(fid((equal - equal[i] * (torch.arange(40) == i)) * 40 / 39) - fid(equal)) * 40 for i in range(40)]
    )
    found = reward.score(features)
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.99
    torch.testing.assert_close(found.double(), influence.mean() - influence, rtol=1e-6, atol=1e-8)


def test_full_works_with_fewer_samples_than_dimensions(build, npz):
    reward = build(features=drawn(400), reference=npz, covariance="full")
    found = reward.score(drawn(4, 1))
    assert found.isfinite().all()
    assert found.std() > 0


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_memory_starts_without_bias_and_is_resumed_bit_for_bit(build, npz, covariance):
    real, steps = drawn(400), [drawn(8, seed) for seed in range(1, 6)]
    whole, broken = (build(features=real, reference=npz, memory=0.99, covariance=covariance) for _ in range(2))
    expected = [whole.score(features) for features in steps]
    alone = build(features=real, reference=npz, memory=0.0, covariance=covariance)
    torch.testing.assert_close(expected[0], alone.score(steps[0]))  # nothing of the zeros it begins with
    for features in steps[:3]:
        broken.score(features)
    resumed = build(features=real, reference=npz, memory=0.99, covariance=covariance)
    for name, tensor in resumed.state_tensors().items():
        tensor.copy_(broken.state_tensors()[name])
    assert all(
        torch.equal(resumed.score(features), last) for features, last in zip(steps[3:], expected[3:], strict=True)
    )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_fault_is_not_remembered(build, npz, covariance):
    reward = build(features=drawn(400), reference=npz, covariance=covariance)
    reward.score(drawn(8, 1))
    before = {name: tensor.clone() for name, tensor in reward.state_tensors().items()}
    assert reward.score(drawn(8, 2).index_fill(0, torch.tensor([3]), torch.inf)).isnan().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in reward.state_tensors().items())


def test_a_reference_from_the_data_set(build, context):
    images = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = []

    def real_images(count):
        asked.append(count)
        return DataLoader(images, batch_size=4)

    reward = build(context=replace(context, real_images=real_images), reference_images=7)
    features = reward.network(images).double()
    assert asked == [7]
    torch.testing.assert_close(reward.reference.mean, features.mean(0))
    torch.testing.assert_close(reward.reference.spread, features.var(0, correction=0))


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        (None, "is no .npz with arrays mu and sigma"),
        ({"mu": np.zeros(32)}, "is no .npz with arrays mu and sigma: it has no sigma"),
        ({"mu": np.zeros(8), "sigma": np.eye(8)}, r"mu \[8\] and sigma \[8, 8\], the network 32 features"),
        ({"mu": np.zeros(32), "sigma": -np.eye(32)}, "a variance below 0"),
        ({"mu": np.array(["x"] * 32), "sigma": np.eye(32)}, "is no .npz"),
        ({"mu": np.array([None] * 32, dtype=object), "sigma": np.eye(32)}, "is no .npz"),
    ],
)
def test_a_bad_reference_is_told(build, tmp_path, arrays, told):
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no npz") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(UserError, match=f"^reference: .*{told}"):
        build(reference=str(path))


def test_inception_sees_the_whole_image_at_299_pixels():
    settings = LeaveOneOutFID.Settings(kind="loo_fid", checkpoint="w.pth").resolved()
    assert (settings.resize, settings.crop, settings.interpolation) == (299, 299, "bilinear")
    assert settings.resolved() == settings


def test_one_completion_has_no_distance_without_it(build, npz):
    with pytest.raises(UserError, match="at least 2"):
        build(features=drawn(9), reference=npz).score(drawn(1))


def test_one_completion_a_step_is_told_at_the_start():
    flags = ["--data.name", "synthetic", "--reward.loo_fid.net", "classifier", "--reward.loo_fid.checkpoint", "c.pt"]
    flags += ["--objective.advantage", "batch_std", "--rollout.num_generations", "1", "--rollout.batch_size"]
    load_recipe(GRPORecipe, [*flags, "2"])
    with pytest.raises(UserError) as error:
        load_recipe(GRPORecipe, [*flags, "1"])
    assert any("reward.loo_fid: a distance without one" in line for line in error.value.problems)
