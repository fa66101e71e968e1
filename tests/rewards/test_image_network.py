"""Networks by name against the library that defines them, pre-processing included, on random weights."""

import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchvision.transforms import v2

from grpo.config import UserError
from grpo.data import to_image
from grpo.models import ClassCondition, Classifier, ClassifierConfig, save_weights, to_uint8
from grpo.rewards import DecodedBatch
from grpo.rewards.class_log_prob import ClassLogProb
from grpo.rewards.feature_distance import FeatureDistance
from grpo.rewards.image_network import ImageNetwork, NetworkTable

IMAGES = F.interpolate(torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)), size=(80, 80)) * 2 - 1


def table(net, path, **keys):
    return NetworkTable(kind="any", net=net, checkpoint=str(path), **keys)


@pytest.fixture
def weights(tmp_path):
    """A network -> the file with its weights."""

    def write(network):
        path = tmp_path / "weights.safetensors"
        save_weights(path, network.state_dict())
        return path

    return write


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision(name, weights, context):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval()
    own = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with torch.no_grad():
        expected = network(own((IMAGES + 1) / 2))
        found = ImageNetwork(table(f"torchvision:{name}", weights(network)), context, output="logits")
        torch.testing.assert_close(found(IMAGES), expected, rtol=1e-5, atol=1e-5)
        assert found.num_classes == 1000
        features = ImageNetwork(table(f"torchvision:{name}", weights(network)), context, output="features")(IMAGES)
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        torch.testing.assert_close(last(features), expected, rtol=1e-5, atol=1e-5)


def test_inception_is_that_of_the_published_weights(weights, context):
    """torchvision's weights of Inception go with its own rescaling of the input; 2048 features at 299 pixels."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(weights=None, transform_input=True, init_weights=False).eval()
    settings = table("torchvision:inception_v3", weights(network), resize=299)
    found = ImageNetwork(settings, context, output="features")(IMAGES[:1])
    network.fc = torch.nn.Identity()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    with torch.no_grad():
        seen = v2.functional.resize((IMAGES[:1] + 1) / 2, [299, 299], antialias=True)
        torch.testing.assert_close(found, network(v2.functional.normalize(seen, mean, std)), rtol=1e-5, atol=1e-5)
    assert found.shape == (1, 2048)


@pytest.mark.parametrize(("name", "share"), [("test_resnet.r160_in1k", 1.0), ("test_vit.r160_in1k", 0.03)])
def test_timm(name, share, weights, context):
    """timm's transform of pictures; bilinear is not rounded here, bicubic differs little, by levels."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    images = torch.where(torch.rand_like(IMAGES) < 0.3, IMAGES.sign(), IMAGES)  # overshoots
    picture = torch.stack([transform(to_image(image)) for image in to_uint8(images)])
    with torch.no_grad():
        settings = table(f"timm:{name}", weights(network))
        found = ImageNetwork(settings, context, output="logits")
        levels = (found.preprocess(images) - picture).abs() * found._std * 255
        assert levels.max() < 2.01
        assert (levels > 0.01).float().mean() <= share
        seen = found.preprocess(IMAGES)
        torch.testing.assert_close(found(IMAGES), network(seen), rtol=1e-5, atol=1e-5)
        features = ImageNetwork(settings, context, output="features")(IMAGES)
        expected = network.forward_head(network.forward_features(seen), pre_logits=True)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert found.num_classes == 1000


def test_the_own_classifier_sees_images_as_they_are(weights, context):
    classifier = Classifier(ClassifierConfig(width=8, num_classes=4)).eval()
    path = weights(classifier)
    found = ImageNetwork(table("classifier", path), context, output="features")
    torch.testing.assert_close(found(IMAGES * 2), classifier.features(IMAGES.mul(2).clamp(-1, 1)))
    low = ImageNetwork(table("classifier", path), replace(context, dtype=torch.bfloat16), output="features")
    assert {parameter.dtype for parameter in low.network.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(low(IMAGES), found(IMAGES), rtol=0.1, atol=0.02)


def test_a_recipe_is_saved_with_the_pre_processing(weights):
    resolved = table("torchvision:resnet18", "w.pt", crop=200).resolved()
    assert (resolved.resize, resolved.crop, resolved.interpolation) == (256, 200, "bilinear")
    assert (resolved.mean, resolved.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert resolved.resolved() == resolved


@pytest.mark.parametrize(
    ("net", "told"),
    [
        ("resnet18", "must be classifier, torchvision:NAME or timm:NAME, not resnet18"),
        ("torchvision:resnet19", "torchvision has no classification network resnet19"),
        ("torchvision:", "must be classifier, torchvision:NAME or timm:NAME"),
        ("timm:resnet_of_mine", "timm has no network resnet_of_mine"),
    ],
)
def test_unknown_networks_are_told(net, told):
    with pytest.raises(UserError, match=f"^net: {told}"):
        table(net, "w.pt").resolved()


def test_other_weights_and_a_missing_library_are_told(weights, context, monkeypatch):
    path = weights(torchvision.models.resnet18(weights=None, num_classes=7))
    with pytest.raises(
        UserError, match=r"weights.safetensors does not hold the weights of torchvision's resnet18: size"
    ):
        ImageNetwork(table("torchvision:resnet18", path), context, output="logits")
    own = weights(Classifier(ClassifierConfig(width=8, num_classes=4)))
    for net in "torchvision:resnet18", "timm:resnet10t":
        with pytest.raises(UserError, match=r'weights.safetensors holds a classifier .*: set net = "classifier"'):
            ImageNetwork(table(net, own), context, output="logits")
    diverged = torchvision.models.resnet18(weights=None)
    diverged.fc.bias.data[3] = float("nan")
    with pytest.raises(UserError, match=r"weights.safetensors: fc.bias holds NaN or infinite numbers"):
        ImageNetwork(table("torchvision:resnet18", weights(diverged)), context, output="logits")
    convolutional = weights(torchvision.models.squeezenet1_1(weights=None))
    with pytest.raises(UserError, match=r"^net: torchvision's squeezenet1_1 does not end in a linear layer"):
        ImageNetwork(table("torchvision:squeezenet1_1", convolutional), context, output="features")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm, which is not installed: pip install 'autoregressive-grpo\[rewards\]'$"):
        table("timm:resnet18", path).resolved()


def test_rewards_by_a_network(weights, context):
    classifier = Classifier(ClassifierConfig(width=8, num_classes=4)).eval()
    path = str(weights(classifier))
    real, places = IMAGES.flip(0), torch.tensor([1, 0])
    batch = DecodedBatch(IMAGES, torch.zeros(2, 4), ClassCondition(torch.tensor([3, 1])), real, places)
    with torch.no_grad():
        found = FeatureDistance(FeatureDistance.Settings(kind="feature_distance", checkpoint=path), context)(batch)
        torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-6)
        found = FeatureDistance(FeatureDistance.Settings(kind="feature_distance", checkpoint=path), context)(
            replace(batch, image_of=torch.tensor([0, 1]))
        )
        apart = classifier.features(IMAGES)[0] - classifier.features(IMAGES)[1]
        torch.testing.assert_close(found, -apart.square().sum().expand(2))
        settings = ClassLogProb.Settings(kind="class_log_prob", checkpoint=path, resize=40)
        found = ClassLogProb(settings, context)(batch)
        small = F.interpolate((IMAGES + 1) / 2, size=(40, 40), mode="bilinear", antialias=True) * 2 - 1
        torch.testing.assert_close(found, classifier(small).log_softmax(-1)[[0, 1], [3, 1]], rtol=1e-4, atol=1e-5)
