"""Readers of shapes: the fit is exact on clean drawings, the network learns to read, and scores are counted right."""

import math

import pytest
import torch

from grpo.config import UserError
from grpo.models import save_weights
from grpo.shapes import (
    Fitting,
    Reader,
    ReaderConfig,
    example,
    load_reader,
    parse,
    reading_loss,
    render,
    reward,
    scenes,
    score,
)
from grpo.shapes.fitting import connected
from grpo.shapes.world import NO, Scenes


def drawn(size, count=150):
    examples = [example("reader", index) for index in range(count)]
    scene = scenes(examples)
    return render(scene, size).float() / 127.5 - 1, scene, [item.request for item in examples]


@pytest.mark.parametrize("size", [24, 28, 32, 96])
def test_fit_reads_clean_drawings_without_a_mistake(size):
    images, scene, requests = drawn(size)
    found = Fitting()(images)
    assert (score(found, requests)["all"] == 1).all()
    assert torch.equal(found.present.sum(1), scene.present.sum(1))
    for row in range(20):  # as numbers: each shape that was drawn has one that was found at its place
        of_scene = scene.centers[row][scene.present[row]]
        nearest = torch.cdist(of_scene, found.centers[row][found.present[row]]).argmin(1)
        assert (found.centers[row][nearest] - of_scene).abs().max() < 0.02 if size < 96 else 0.01
        assert (found.radii[row][nearest] - scene.radii[row][scene.present[row]]).abs().max() < 0.02
        assert torch.equal(found.shapes[row][nearest], scene.shapes[row][scene.present[row]])
        assert torch.equal(found.colors[row][nearest], scene.colors[row][scene.present[row]])


def test_fit_reads_noisy_drawings():
    images, _, requests = drawn(32)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert score(Fitting()(images + 0.15 * noise), requests)["all"].mean() > 0.97


def test_fit_names_nothing_in_what_is_no_shape():
    image = -0.85 * torch.ones(3, 3, 32, 32)
    image[1] = 1.0  # all white: one thing, of no shape
    image[2, 0, 4:28, 15] = 1.0  # a red line
    found = Fitting()(image)
    assert found.present.sum(1).tolist() == [0, 1, 1]
    assert found.shapes[1:, 0].tolist() == [NO, NO]


def test_no_image_is_read_as_no_scene():
    found = Fitting()(torch.zeros(0, 3, 32, 32))
    assert [len(field) for field in found] == [0] * len(found)
    assert len(score(found, [])["all"]) == 0


def test_parts_are_connected_over_four_neighbours():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    labels = connected(mask[None])[0]
    assert (labels > 0).equal(mask)
    assert labels[0, 0] == labels[0, 1]
    assert labels[0, 3] == labels[1, 3] == labels[1, 2]
    assert len(labels[mask].unique()) == 3


def test_network_learns_to_read():
    images, scene, requests = drawn(24, count=360)
    torch.manual_seed(0)
    reader = Reader(ReaderConfig(width=16))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=4e-3)
    for _ in range(50):
        rows = torch.randint(300, (32,))
        loss, _ = reading_loss(reader(images[rows]), Scenes(*(field[rows] for field in scene)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = score(reader.read(images[300:]), requests[300:])
    assert scores["color"].nanmean() > 0.8
    assert scores["count"].mean() > 0.9
    assert scores["relation"].nanmean() > 0.9


def test_reader_is_written_and_read(tmp_path):
    reader = Reader(ReaderConfig(width=8)).eval()
    save_weights(tmp_path / "reader.safetensors", reader.state_dict(), config=reader.config)
    images, _, _ = drawn(24, count=4)
    assert torch.equal(load_reader(tmp_path / "reader.safetensors")(images), reader(images))
    save_weights(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(UserError, match="not a reader of shapes; train one with grpo reader"):
        load_reader(tmp_path / "other.safetensors")


def scene_of(*things):
    """One scene of (shape, colour, radius, x, y)."""
    shapes, colors, radii, x, y = (torch.tensor([values]) for values in zip(*things, strict=True))
    return Scenes(shapes, colors, radii, torch.stack([x, y], -1))


RED_CIRCLE = (0, 0, 0.13, 0.2, 0.5)
BLUE_SQUARE = (1, 5, 0.19, 0.7, 0.45)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a small red circle left of a blue square", {"shape": 1, "color": 1, "size": 1, "relation": 1, "all": 1}),
        ("a blue square right of a circle", {"shape": 1, "color": 1, "size": None, "relation": 1, "all": 1}),
        ("a red circle right of a blue square", {"shape": 1, "color": 1, "relation": 0, "place": None, "all": 0}),
        ("a blue circle and a red square", {"shape": 1, "color": 0, "all": 0}),
        ("a red circle", {"shape": 1, "color": 1, "count": 0, "all": 0}),
        ("a red circle at the left", {"place": 1, "count": 0, "all": 0}),
        ("two red circles", {"shape": 0.5, "color": 0.5, "count": 1, "all": 0}),
        ("a ring above a cross", {"shape": 0, "relation": 0, "all": 0}),
    ],
)  # fmt: skip
def test_scores_by_hand(text, expected):
    scores = {name: values.item() for name, values in score(scene_of(RED_CIRCLE, BLUE_SQUARE), [parse(text)]).items()}
    for name, value in expected.items():
        assert math.isnan(scores[name]) if value is None else scores[name] == value, name


def test_reward_mixes_the_mean_over_attributes_with_all_or_nothing():
    scores = score(scene_of(RED_CIRCLE, BLUE_SQUARE), [parse("a red circle right of a blue square")])
    mean = 3 / 4  # shape, colour and count, and not the relation
    assert reward(scores, strictness=0.0).item() == pytest.approx(mean)
    assert reward(scores, strictness=1.0).item() == 0
    assert reward(scores, strictness=0.5).item() == pytest.approx(mean / 2)
