"""From images to metrics, on one process; tests/recipes does it on two."""

import math
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from grpo.config import Evaluation, UserError
from grpo.evaluation import (
    ClassifierJudge,
    DrawnImages,
    FeatureStatistics,
    InceptionJudge,
    classifier_gap,
    compare,
    measure_images,
    save_pngs,
)
from grpo.evaluation.sources import FolderImages, NpzImages
from grpo.models import save_weights


class MeanColor(nn.Module):
    """Features are the mean red, green and blue; classes are the same three."""

    def features(self, images):
        return images.mean(dim=(2, 3))

    def head(self, features):
        return 10 * features


def colored(class_ids, *, noise, seed=0):
    """Images whose channel `class_id` is bright."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, noise, (len(class_ids), 3, 4, 4), generator=generator)
    pixels[torch.arange(len(class_ids)), class_ids] += 100
    pixels = pixels.to(torch.uint8)
    return DrawnImages(class_ids, lambda _, row_ids: pixels[row_ids])


JUDGE = ClassifierJudge(MeanColor())


def metrics_of(images, reference, **settings):
    look = partial(measure_images, judge=JUDGE, batch_size=16)
    return compare(look(images, reward=JUDGE), look(reference), settings=Evaluation(**settings))


CLASS_IDS = torch.arange(60) % 3


def test_measurements_do_not_depend_on_the_batch_size():
    images = colored(CLASS_IDS, noise=60)
    one, other = (measure_images(images, JUDGE, batch_size=size, reward=JUDGE) for size in (60, 7))
    assert_close(one, other, rtol=0, atol=0)
    assert one.features.shape == (60, 3)
    assert one.size == (4, 4)


def test_metrics_of_good_and_bad_images():
    reference = colored(CLASS_IDS, noise=60, seed=1)
    good = metrics_of(colored(CLASS_IDS, noise=60), reference)
    wrong_class = DrawnImages((CLASS_IDS + 1) % 3, reference.draw)
    bad = metrics_of(wrong_class, reference)
    collapsed = metrics_of(colored(CLASS_IDS * 0, noise=60), reference)
    assert good["accuracy"] == 1
    assert bad["accuracy"] == 0
    assert good["reward_mean"] > bad["reward_mean"]
    assert bad["fid"] == pytest.approx(0, abs=1e-9)  # the same images, whatever they were drawn for
    assert collapsed["fid"] > 10 * good["fid"]
    assert collapsed["recall"] < 0.5 < good["recall"]
    assert collapsed["inception_score"] < 1.1 < good["inception_score"]


def test_reward_is_the_log_probability():
    images = colored(torch.tensor([1, 1, 2]), noise=1)
    measured = measure_images(images, JUDGE, batch_size=2, reward=JUDGE)
    bright, dark = 10 * (100 / 127.5 - 1), -10
    assert_close(measured.rewards, torch.full((3,), bright - math.log(math.exp(bright) + 2 * math.exp(dark))))
    assert_close(measured.probabilities.sum(1), torch.ones(3))
    assert classifier_gap(measured) == pytest.approx(0, abs=1e-6)  # reward and judge are one network
    assert classifier_gap(measured._replace(rewards=measured.rewards + 2)) == pytest.approx(2, abs=1e-6)


def test_settings_reach_the_distances():
    images, reference = colored(CLASS_IDS, noise=60), colored(CLASS_IDS, noise=60, seed=1)
    plain, nearer, halves = (
        metrics_of(images, reference, **keys) for keys in ({}, {"nearest_k": 1}, {"kid_subset_size": 30})
    )
    assert nearer["precision"] < plain["precision"]
    assert plain["kid_std"] == 0 < halves["kid_std"]


def test_unknown_classes_give_no_accuracy_and_no_reward(tmp_path):
    save_pngs(tmp_path, colored(CLASS_IDS, noise=60).pixels(0, 60), torch.arange(60))
    images = FolderImages(tmp_path)
    seen = measure_images(images, JUDGE, batch_size=60)
    metrics = compare(seen, seen)
    assert not {"accuracy", "reward_mean"} & set(metrics)
    with pytest.raises(UserError, match="needs the images' classes"):
        measure_images(images, JUDGE, batch_size=60, reward=JUDGE)


def test_what_cannot_be_compared_is_told():
    images = measure_images(colored(CLASS_IDS, noise=60), JUDGE, batch_size=60)
    with pytest.raises(UserError, match="images are 4x4 pixels and the reference 8x8"):
        compare(images, images._replace(size=(8, 8)))
    with pytest.raises(UserError, match="3 images are too few"):
        compare(images._replace(features=images.features[:3]), images)
    images = DrawnImages(torch.arange(5), colored(torch.zeros(5).long(), noise=2).draw)
    with pytest.raises(UserError, match=r"classes 0\.\.4 and the judging classifier 3 classes"):
        measure_images(images, JUDGE, batch_size=5)
    with pytest.raises(UserError, match=r"classes 0\.\.4 and the rewarding classifier 3 classes"):
        measure_images(images, Unnamed(MeanColor()), batch_size=5, reward=JUDGE)


class Unnamed(ClassifierJudge):
    """Its classes are not the generator's, like Inception's."""

    names_classes = False


def test_features_that_are_no_numbers_give_no_metrics():
    images = measure_images(colored(CLASS_IDS, noise=60), JUDGE, batch_size=60)
    for value in (math.nan, math.inf):
        features = torch.randn(60, 16).index_fill(0, torch.tensor([7]), value)
        metrics = compare(images._replace(features=features), images._replace(features=torch.randn(60, 16)))
        assert all(math.isnan(metrics[name]) for name in ("fid", "kid", "precision", "recall"))


def test_inception_weights_are_read_safely_and_given_to_torch_fidelity(tmp_path, monkeypatch):
    class Extractor(nn.Module):
        def __init__(self, name, features_list, path):
            super().__init__()
            self.weights = torch.load(path, weights_only=True)
            if "fc.bias" not in self.weights:
                raise RuntimeError("missing keys")

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return pixels.double().mean(dim=(2, 3)), pixels.float().mean(dim=(1, 2, 3))[:, None]

    package, module = (ModuleType(name) for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"))
    package.__spec__ = ModuleSpec("torch_fidelity", None)
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    save_weights(tmp_path / "inception.pth", {"fc.bias": torch.ones(3)})
    save_weights(tmp_path / "other.pth", {"head.bias": torch.ones(3)})
    judge = InceptionJudge(tmp_path / "inception.pth", device=torch.device("cpu"))
    assert_close(judge.network.weights["fc.bias"], torch.ones(3))
    measured = measure_images(colored(CLASS_IDS, noise=60), judge, batch_size=60)
    assert measured.class_ids is None  # Inception's classes are not the generator's
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((5, 4, 4, 3), np.uint8), mu=np.ones(3), sigma=np.eye(3))
    reference = measure_images(NpzImages(tmp_path / "adm.npz"), judge, batch_size=5)
    assert_close(reference.statistics.mean, torch.ones(3).double())
    np.savez(tmp_path / "others.npz", arr_0=np.zeros((5, 4, 4, 3), np.uint8), mu=np.ones(2), sigma=np.eye(2))
    with pytest.raises(UserError, match="mu and sigma of 2 features, and Inception 3"):
        measure_images(NpzImages(tmp_path / "others.npz"), judge, batch_size=5)
    at_one = measured._replace(statistics=FeatureStatistics(torch.ones(3).double() * 3, torch.eye(3).double()))
    assert compare(at_one, reference)["fid"] == pytest.approx(3 * 2**2)
    assert measure_images(NpzImages(tmp_path / "adm.npz"), JUDGE, batch_size=5).statistics is None
    assert measure_images(NpzImages(tmp_path / "adm.npz", limit=4), judge, batch_size=5).statistics is None
    save_weights(tmp_path / "nan.pth", {"fc.bias": torch.full((3,), math.nan)})
    with pytest.raises(UserError, match=r"fc\.bias holds NaN"):
        InceptionJudge(tmp_path / "nan.pth", device=torch.device("cpu"))
    with pytest.raises(UserError, match="does not hold torch-fidelity's Inception"):
        InceptionJudge(tmp_path / "other.pth", device=torch.device("cpu"))


def test_inception_without_torch_fidelity(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"pip install 'autoregressive-grpo\[evaluation\]'"):
        InceptionJudge(tmp_path / "inception.pth", device=torch.device("cpu"))


def test_accuracy_is_the_share_of_images_of_their_class():
    seen = measure_images(colored(CLASS_IDS, noise=60), JUDGE, batch_size=60)
    asked = seen.class_ids.clone()
    asked[:15] = (asked[:15] + 1) % 3
    assert compare(seen._replace(class_ids=asked), seen)["accuracy"] == 0.75
