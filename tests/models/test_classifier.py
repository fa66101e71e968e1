"""The classifier's sizes are read off its weights."""

import pytest
import torch

from grpo.config import UserError
from grpo.models import Classifier, ClassifierConfig, load_classifier, save_weights


@torch.no_grad()
def test_saved_classifier_is_loaded_with_its_sizes(tmp_path):
    model = Classifier(ClassifierConfig(width=8, num_classes=5)).eval()
    save_weights(tmp_path / "classifier.safetensors", model.state_dict())
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    images = torch.rand(2, 3, 20, 20)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.features(images).shape == (2, 32)
    assert torch.equal(loaded(images), model(images))


def test_other_weights_are_not_a_classifier(llamagen):
    with pytest.raises(UserError, match="not a classifier"):
        load_classifier(llamagen / "gpt_c2i.pt")


def test_impossible_width_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        ClassifierConfig(width=12)
