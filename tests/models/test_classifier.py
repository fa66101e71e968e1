"""The classifier: shapes, features, weights in and out."""

import pytest
import torch
from torch.nn import functional as F

from grpo.config import UserError
from grpo.models import Classifier, ClassifierConfig, load_classifier, save_weights


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(width=8, num_classes=5)).eval()


@pytest.mark.parametrize("side", [8, 32, 50])
def test_images_of_any_size_give_features_that_the_logits_are_linear_in(classifier, side):
    images = torch.rand(3, 3, side, side) * 2 - 1
    features = classifier.features(images)
    assert features.shape == (3, 32)
    expected = features @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(images), expected)


def test_an_image_does_not_depend_on_its_batch(classifier):
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(classifier(images)[1:2], classifier(images[1:2]), rtol=1e-4, atol=1e-5)


def test_weights_alone_restore_it(classifier, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    for name in ("classifier.safetensors", "classifier.pth"):
        save_weights(tmp_path / name, classifier.state_dict())
        loaded = load_classifier(tmp_path / name)
        assert loaded.config == classifier.config
        assert not loaded.training
        assert torch.equal(loaded(images), classifier(images))


def test_it_learns(classifier):
    images = torch.full((10, 3, 16, 16), -1.0)
    images[5:, :, :8] = 1.0  # bright upper halves are class 1
    class_ids = torch.arange(10) // 5
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    first = F.cross_entropy(classifier(images), class_ids).item()
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(classifier(images), class_ids).backward()
        optimizer.step()
    assert F.cross_entropy(classifier(images), class_ids).item() < 0.1 * first


@pytest.mark.parametrize("damage", ["missing", "superfluous", "misshapen"])
def test_other_weights_are_refused_in_one_line(classifier, damage, tmp_path):
    weights = classifier.state_dict()
    if damage == "missing":
        del weights["layers.1.conv2.weight"]
    elif damage == "superfluous":
        weights["extra"] = torch.zeros(1)
    else:
        weights["layers.0.conv1.weight"] = torch.zeros(12, 3, 3, 3)  # no multiple of 8
    path = tmp_path / "weights.safetensors"
    save_weights(path, weights)
    with pytest.raises(UserError, match=r"weights.safetensors: not a classifier; train one"):
        load_classifier(path)


def test_width_must_suit_the_normalisation():
    with pytest.raises(ValueError, match="width 12 must be a multiple of 8"):
        ClassifierConfig(width=12)
