"""The published protocol against a plain evaluator: same network, features and numbers."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from grpo.config import Evaluation
from grpo.evaluation import FeatureStatistics, InceptionJudge, adm, compare, distances, measure_images, open_images
from grpo.models import read_weights, save_weights
from tests.evaluation import plain_inception as plain

torch_fidelity = pytest.importorskip("torch_fidelity", reason="Inception's network is torch-fidelity's")
IMAGES, REFERENCES, SIDE = 6, 7, 40
DIMENSIONS = 200  # of the features that distances are taken of: roots of 2048 x 2048 matrices take minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of the published layout, and images; the reference has statistics too."""
    folder = tmp_path_factory.mktemp("inception")
    weights = random_weights()
    save_weights(folder / "inception.pth", weights)
    random = np.random.default_rng(0)
    arrays = {}
    for name, count in (("images", IMAGES), ("reference", REFERENCES)):
        coarse = random.integers(0, 256, (count, 5, 5, 3))
        arrays[name] = (coarse.repeat(SIDE // 5, 1).repeat(SIDE // 5, 2) * random.uniform(0.3, 1)).astype(np.uint8)
    np.savez(folder / "images.npz", arr_0=arrays["images"])
    statistics = {}
    for mean, covariance, dimensions in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        statistics[mean] = random.normal(0.3, 0.1, dimensions)
        statistics[covariance] = np.diag(random.uniform(0.01, 0.1, dimensions))
    np.savez(folder / "reference.npz", arr_0=arrays["reference"], **statistics)
    return folder


def random_weights():
    from torch_fidelity import feature_extractor_inceptionv3 as module

    Extractor = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(Extractor, "load_state_dict"),
    ):
        network = Extractor("inception", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.05, 0.2)
            layer.weight.data.uniform_(0.7, 1.3)
            layer.bias.data.normal_(0.1, 0.1)
    for name, values in network.Mixed_7c.named_parameters():
        if ".bn." in name:
            values.data.mul_(0.002)  # features of about 0.4, and probabilities that are neither 0 nor 1
    return network.state_dict()


@pytest.fixture(scope="module")
def seen(folder):
    """Both sets as the judge of a protocol sees them."""
    judge = InceptionJudge(folder / "inception.pth", device=torch.device("cpu"), spatial=True)
    look = partial(measure_images, judge=judge, batch_size=7)
    return look(open_images(folder / "images.npz")), look(open_images(folder / "reference.npz"))


@pytest.fixture(scope="module")
def expected(folder):
    """The same images through the plain network."""
    weights = read_weights(folder / "inception.pth")
    both = []
    for name in ("images", "reference"):
        pixels = torch.from_numpy(np.load(folder / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        both.append(plain.features_of(weights, pixels))
    return both


def test_features_are_those_of_the_published_network(seen, expected):
    for measured, (pooled, spatial, logits) in zip(seen, expected, strict=True):
        assert measured.spatial.shape[1] == 17 * 17 * 7 == 2023
        assert measured.features.std(0).mean() > 0.001  # the images differ
        assert_close(measured.features, pooled, rtol=1e-3, atol=1e-5 * float(pooled.max()))
        assert_close(measured.spatial, spatial, rtol=1e-3, atol=1e-5 * float(spatial.max()))
        assert_close(measured.probabilities, logits.softmax(1), rtol=1e-3, atol=1e-5)


def test_a_protocol_reports_what_the_plain_evaluator_does(folder, seen, expected):
    """Of some of the features, so that the plain matrix roots take no minutes."""

    def cut(statistics):
        return FeatureStatistics(statistics.mean[:DIMENSIONS], statistics.covariance[:DIMENSIONS, :DIMENSIONS])

    images, reference = (
        side._replace(features=side.features[:, :DIMENSIONS], spatial=side.spatial[:, :DIMENSIONS]) for side in seen
    )
    both = {name: cut(getattr(reference, name)) for name in ("statistics", "spatial_statistics")}
    metrics = compare(images, reference._replace(**both), settings=Evaluation(protocol="llamagen"))
    (pooled, spatial, logits), (reference_pooled, _, _) = (
        [column[:, :DIMENSIONS].numpy() for column in side[:2]] + [side[2]] for side in expected
    )
    with np.load(folder / "reference.npz") as file:
        for name, features, mean, covariance in (("fid", pooled, "mu", "sigma"), ("sfid", spatial, "mu_s", "sigma_s")):
            published = file[mean][:DIMENSIONS], file[covariance][:DIMENSIONS, :DIMENSIONS]
            distance = plain.frechet(plain.moments(features.astype(np.float64)), published)
            assert metrics[name] == pytest.approx(distance, rel=1e-3), name
    assert metrics["inception_score"] == pytest.approx(plain.score(logits.softmax(1).numpy()), rel=1e-3)
    pair = plain.precision_and_recall(pooled, reference_pooled)
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(pair)


def test_distances_and_score_are_those_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    random = np.random.default_rng(3)
    sets = [random.normal(size=(200, 24)) @ random.normal(size=(24, 24)) + shift for shift in (0, 0.5)]
    statistics = [dict(zip(("mu", "sigma"), plain.moments(side), strict=True)) for side in sets]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    ours = distances.frechet_distance(*(FeatureStatistics.of(torch.from_numpy(side)) for side in sets))
    assert ours == pytest.approx(theirs, rel=1e-6)
    logits = torch.from_numpy(random.normal(size=(300, 10)))
    theirs = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    ours = distances.score_of_parts(logits.softmax(1).split(100))[0]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_is_the_one_with_a_matrix_square_root():
    random = np.random.default_rng(1)
    sets = [random.normal(size=(200, 24)) @ random.normal(size=(24, 24)) + shift for shift in (0, 0.5)]
    ours = distances.frechet_distance(*(FeatureStatistics.of(torch.from_numpy(side)) for side in sets))
    assert ours == pytest.approx(plain.frechet(*map(plain.moments, sets)), rel=1e-6)


def vectors(count, seed, *, scale=0.05):
    """Squared norms of about 200 and squared distances of about 3, which rounding in fp16 moves a lot."""
    return np.random.default_rng(seed).normal(0.6, scale, (count, 512)).astype(np.float32)


def test_precision_and_recall_round_as_the_evaluator_does(monkeypatch):
    """In blocks smaller than the sets, so that what lies in several of them is put together right."""
    monkeypatch.setattr(adm, "_ROWS_AT_ONCE", 64)
    images, reference = vectors(150, 0), vectors(130, 1, scale=0.052)
    pair = adm.precision_recall(torch.from_numpy(images), torch.from_numpy(reference))
    assert pair == pytest.approx(plain.precision_and_recall(images, reference))
    assert pair != distances.precision_recall(torch.from_numpy(images), torch.from_numpy(reference))


def test_distances_beyond_fp16_are_taken_in_fp32():
    images, reference = (torch.from_numpy(vectors(40, seed)) * 100 for seed in (0, 1))
    assert adm.precision_recall(images, reference) == distances.precision_recall(images, reference)


def test_score_of_parts_in_their_order():
    probabilities = torch.from_numpy(np.random.default_rng(2).dirichlet(np.ones(6), 11_000)).float()
    sorted_by_class = probabilities[probabilities.argmax(1).argsort()]  # so that the order matters
    mean, _ = adm.inception_score(sorted_by_class)
    assert mean == pytest.approx(plain.score(sorted_by_class.numpy()), rel=1e-4)
    assert mean != pytest.approx(distances.inception_score(sorted_by_class)[0], rel=1e-2)
