"""Rewards by hand, their sum, and that batches can be cut anywhere."""

from contextlib import contextmanager

import pytest
import torch

from grpo.config import Compile, Reward, UserError
from grpo.models import TOKENIZER_SPECS, Classifier, ClassifierConfig, VQModel, save_weights
from grpo.rewards import ClassLogProb, Completions, EmbeddingCosine, Reconstruction, RewardSum, build_rewards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32)).eval()


@pytest.fixture
def completions(tokenizer):
    tokens = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    images, real = torch.full((3, 3, 16, 16), 0.5), torch.zeros(3, 3, 16, 16)
    return Completions(images, tokens, torch.tensor([0, 1, 2]), real, torch.arange(3))


def test_reconstruction_by_hand(completions):
    torch.testing.assert_close(Reconstruction("l1")(completions), torch.full((3,), -0.5))
    torch.testing.assert_close(Reconstruction("l2")(completions), torch.full((3,), -0.25))


def test_class_log_prob_by_hand(completions):
    logits = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(-1)
    reward = ClassLogProb(lambda images: logits.expand(len(images), -1))
    torch.testing.assert_close(reward(completions), logits[0])


def test_embedding_cosine_is_zero_for_the_real_codes_own_vectors(tokenizer):
    """A completion whose code vectors point along the latents has cosine 1."""
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = tokenizer.encode(images)
    reward = EmbeddingCosine(tokenizer)
    own = reward(Completions(images, tokens, torch.zeros(2), images, torch.arange(2)))
    other = reward(Completions(images, (tokens + 7) % 32, torch.zeros(2), images, torch.arange(2)))
    latents, vectors = tokenizer.encode_latents(images).flatten(1), tokenizer.lookup(tokens).flatten(1)
    cosine = (latents * vectors).sum(1) / (latents.norm(dim=1) * vectors.norm(dim=1))
    torch.testing.assert_close(own, cosine - 1, rtol=1e-5, atol=1e-6)
    assert (own > other).all()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_weighted_sum_over_any_batches(tokenizer, batch_size):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (3, 4, 16), generator=generator)
    real = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
    total = RewardSum(tokenizer, [(Reconstruction("l2"), 2.0), (Reconstruction("l1"), -0.5)], batch_size=batch_size)
    rewards = total(tokens, torch.arange(3), real, show=2)
    images = tokenizer.decode(tokens.flatten(0, 1)).view(3, 4, 3, 16, 16)
    l2 = -((images - real[:, None]) ** 2).mean(dim=(2, 3, 4))
    l1 = -(images - real[:, None]).abs().mean(dim=(2, 3, 4))
    torch.testing.assert_close(rewards.components, torch.stack([l2, l1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rewards.total, 2 * l2 - 0.5 * l1, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rewards.images, images[:2], rtol=1e-4, atol=1e-5)


def test_started_rewards_are_those_of_the_call(tokenizer):
    tokens = torch.randint(32, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    rewards = RewardSum(tokenizer, [(Reconstruction("l2"), 1.0)], batch_size=3, other_work=True)
    arguments = (tokens, torch.arange(2), torch.zeros(2, 3, 16, 16))
    phases = []

    @contextmanager
    def timer(phase):
        phases.append(phase)
        yield

    started, called = rewards.start(*arguments, show=1, timer=timer)(), rewards(*arguments, show=1)
    assert all(map(torch.equal, started, called))
    assert phases == ["reward", "decode", "decode", "decode"]


def test_built_from_a_recipe(tokenizer, tmp_path):
    save_weights(tmp_path / "c.safetensors", Classifier(ClassifierConfig(width=8, num_classes=4)).state_dict())
    config = Reward(class_log_prob_weight=0.5, classifier_checkpoint=str(tmp_path / "c.safetensors"))
    rewards = build_rewards(config, tokenizer, num_classes=4, device=CPU, compile=Compile())
    assert (rewards.names, rewards.weights) == (["reconstruction", "class_log_prob"], [1.0, 0.5])
    with pytest.raises(UserError, match="knows 4 classes"):
        build_rewards(config, tokenizer, num_classes=10, device=CPU, compile=Compile())
