"""The verifiable reward of the world of shapes."""

from types import SimpleNamespace

import pytest
import torch

from grpo.config import UserError
from grpo.models import save_weights
from grpo.rewards import DecodedBatch
from grpo.rewards.shapes import ShapesReward
from grpo.shapes import Reader, ReaderConfig, example, render, scenes


def batch(captions, images, image_of):
    condition = SimpleNamespace(rows=len(images))
    return DecodedBatch(images, None, condition, images[:0], torch.tensor(image_of), captions=captions)


def pictures(*indices):
    examples = [example("train", index) for index in indices]
    return [item.caption for item in examples], render(scenes(examples), 28).float() / 127.5 - 1


def test_each_completion_is_held_against_its_own_caption(context):
    captions, images = pictures(1, 2, 4)  # two shapes, one, two
    rewards = ShapesReward(ShapesReward.Settings(kind="shapes"), context)(
        batch(captions, images[[0, 1, 1, 2]], [0, 1, 0, 2])
    )
    assert rewards[[0, 1, 3]].tolist() == [1, 1, 1]
    assert rewards[2] < 0.5


def test_a_caption_of_another_world_ends_the_run(context):
    reward = ShapesReward(ShapesReward.Settings(kind="shapes"), context)
    with pytest.raises(UserError, match=r'"a cat" is not of the world of shapes'):
        reward(batch(["a cat"], pictures(1)[1], [0]))


def test_the_network_needs_its_weights_and_reads_by_them(context, tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint is required"):
        ShapesReward(ShapesReward.Settings(kind="shapes", reader="network"), context)
    torch.manual_seed(0)
    reader = Reader(ReaderConfig(width=8))
    save_weights(tmp_path / "reader.safetensors", reader.state_dict(), config=reader.config)
    settings = ShapesReward.Settings(kind="shapes", reader="network", checkpoint=str(tmp_path / "reader.safetensors"))
    captions, images = pictures(1, 2)
    rewards = ShapesReward(settings, context)(batch(captions, images, [0, 1]))
    assert ((rewards >= 0) & (rewards <= 1)).all()
