"""The discriminator's part of tokenizer training, on one rank: losses, adaptive weight, schedule, what is skipped."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from grpo.config import TokenizerRecipe
from grpo.models import TOKENIZER_SPECS, VQModel, load_discriminator
from grpo.parallel import World
from grpo.training import Adversary, GuardedOptimizer
from grpo.training.adversary import ADVERSARY_NAME, discriminator_loss, generator_loss

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SMALL = {"weight": 0.5, "start": 1, "dim": 4, "num_layers": 2}


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(**settings):
    """A tiny tokenizer and its adversary."""
    recipe = TokenizerRecipe.model_validate(
        {
            "data": {"name": "synthetic", "image_size": 16},
            "tokenizer": {"downsample_size": 4},
            "training": {"mixed_precision": "fp32"},
            "optimizer": {"lr": 1e-2},
            "adversary": SMALL | settings,
        }
    )
    torch.manual_seed(1)
    tokenizer = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32)).train()
    optimizer = GuardedOptimizer(tokenizer, recipe.optimizer, total_steps=100, max_skipped_steps=3)
    return tokenizer, Adversary(recipe, tokenizer, optimizer, world=WORLD)


def play(tokenizer, adversary, images):
    """One micro-batch: the error, the adversary's loss, and the reconstruction that both are of."""
    reconstruction = tokenizer(images)[0].view_as(images)
    error = F.mse_loss(reconstruction, images)
    return error, adversary.loss(error, reconstruction, images), reconstruction


@pytest.mark.parametrize(
    ("kind", "own", "generator"),
    [
        ("hinge", 0.5 * ((1 + 0 + 1.5) / 3 + (1 + 3) / 2), -1.0),
        # log(1 + exp(-x)) of 0, 2, -.5 and log(1 + exp(x)) of 0, 2
        ("vanilla", 0.5 * ((0.693147 + 0.126928 + 0.974077) / 3 + (0.693147 + 2.126928) / 2), -1.0),
        ("non_saturating", 0.5 * ((0.693147 + 0.126928 + 0.974077) / 3 + 1.4100375), (0.693147 + 0.126928) / 2),
    ],
)
def test_losses_by_hand(kind, own, generator):
    real, fake = torch.tensor([0.0, 2.0, -0.5]), torch.tensor([0.0, 2.0])
    assert discriminator_loss(real, fake, kind=kind).item() == pytest.approx(own, rel=1e-5)
    assert generator_loss(fake, kind=kind).item() == pytest.approx(generator, rel=1e-5)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(images):
    tokenizer, adversary = make(adaptive=True)
    reconstruction = tokenizer(images)[0].view_as(images)
    error, adversarial = F.mse_loss(reconstruction, images), -adversary.discriminator(reconstruction).mean()
    last = tokenizer.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (error, adversarial)]
    loss = adversary.loss(error, reconstruction, images)
    torch.testing.assert_close(loss, 0.5 * norms[0] / (norms[1] + 1e-4) * adversarial, rtol=1e-4, atol=1e-6)
    assert adversary.update()["adversarial_weight"] == pytest.approx((0.5 * norms[0] / norms[1]).item(), rel=0.05)


def test_each_side_moves_its_own_weights_only(images):
    tokenizer, adversary = make()
    before = {name: tensor.clone() for name, tensor in adversary.discriminator.named_parameters()}
    error, loss, _ = play(tokenizer, adversary, images)
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    learned = {name: parameter.grad.clone() for name, parameter in adversary.discriminator.named_parameters()}
    (error + loss).backward()
    assert all(torch.equal(learned[name], p.grad) for name, p in adversary.discriminator.named_parameters())
    assert tokenizer.decoder.conv_out.weight.grad.norm() > 0
    adversary.update()
    moved = [name for name, p in adversary.discriminator.named_parameters() if not torch.equal(before[name], p)]
    assert {"main.0.weight", "main.2.weight", "main.5.weight", "main.8.weight"} <= set(moved)


def test_it_learns_to_tell_and_its_running_statistics_follow(images):
    tokenizer, adversary = make()
    first, *_, last = (play(tokenizer, adversary, images) and adversary.update() for _ in range(15))
    assert last["discriminator_loss"] < 0.7 * first["discriminator_loss"]
    assert last["logits_real"] > last["logits_fake"]
    assert adversary.discriminator.main[3].running_mean.abs().sum() > 0


def test_micro_batches_weigh_as_their_images(images):
    """What one image adds is the same in parts of any size, but for what the normalisation sees."""
    tokenizer, adversary = make()
    adversary.discriminator.eval()  # so that the normalisation sees nothing
    gradients = []
    for parts in ([images], [images[:1], images[1:]]):
        for part in parts:
            play(tokenizer.eval(), adversary, part)
        count = sum(rows for rows, _ in adversary._seen)
        gradients.append([parameter.grad / count for parameter in adversary.discriminator.parameters()])
        adversary.optimizer.adamw.zero_grad()
        adversary._seen.clear()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_nothing_happens_before_its_start(images):
    tokenizer, adversary = make(start=3)
    for steps, is_on in ((0, False), (1, False), (2, True)):
        adversary._generator.steps = steps
        _, loss, _ = play(tokenizer, adversary, images)
        assert isinstance(loss, torch.Tensor) == is_on
        assert bool(adversary.update()) == is_on


def test_what_is_not_finite_leaves_no_trace(images):
    tokenizer, adversary = make()
    play(tokenizer, adversary, images)
    adversary.update()
    before = {name: tensor.clone() for name, tensor in adversary.discriminator.state_dict().items()}
    play(tokenizer, adversary, images.clone().fill_(float("nan")))
    assert adversary.update()["discriminator_skipped"] == 1
    after = adversary.discriminator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "num_batches" not in name)


def test_it_is_saved_with_its_sizes_and_may_be_started_from(tmp_path, images):
    tokenizer, adversary = make()
    play(tokenizer, adversary, images)
    adversary.update()
    adversary.save(tmp_path)
    loaded = load_discriminator(tmp_path / ADVERSARY_NAME)
    assert (loaded.config.width, loaded.config.num_layers) == (4, 2)
    torch.testing.assert_close(loaded(images), adversary.discriminator.eval()(images))
    _, other = make(checkpoint=str(tmp_path / ADVERSARY_NAME))
    assert other.discriminator.training
    assert torch.equal(other.discriminator.main[0].weight, loaded.main[0].weight)
