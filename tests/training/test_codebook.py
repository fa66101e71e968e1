"""The codebook's part of tokenizer training, on one rank without networks around it."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from grpo.config import TokenizerLoss
from grpo.models import VQConfig
from grpo.models.vq import VectorQuantizer
from grpo.training import Codebook


class Steps:
    """Stands for an optimizer: how many there were, and whether the last was skipped."""

    def __init__(self, steps=0):
        self.steps = steps
        self.skipped_in_a_row = 0


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(codes, steps=100, **settings):
    """A quantizer in train mode with these codes [K, C], its codebook, the step counter."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(VQConfig(codebook_size=len(codes), codebook_embed_dim=codes.shape[1])).train()
    quantizer.embedding.requires_grad_(False).weight.copy_(codes)
    step = Steps(steps)
    return quantizer, Codebook(quantizer, TokenizerLoss(**settings), step), step


def latents_of(*rows):
    """Rows [N, C] as one image [1, C, 1, N]."""
    return torch.tensor(rows, dtype=torch.float32).T[None, :, None]


def test_codes_follow_the_running_sum_of_unit_latents():
    quantizer, codebook, _ = make(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), codebook_ema=0.75, restart_threshold=0.0)
    quantizer(latents_of([3.0, 0.0], [4.0, 3.0], [0.0, 5.0]))
    codebook.update()
    # 0.75 * old + 0.25 * sums; the latents of code 0 are (1, 0) and (.8, .6), of code 1 (0, 1).
    expected = torch.tensor([[1.5 + 0.25 * 1.8, 0.25 * 0.6], [0.0, 1.5 + 0.25]])
    torch.testing.assert_close(quantizer.embedding.weight, expected)


def test_micro_batches_add_up_to_one_batch():
    latents = torch.randn(4, 8, 3, 3)
    weights = []
    for parts in ([latents], latents.split(1)):
        quantizer, codebook, _ = make(torch.eye(8), restart_threshold=0.0)
        for part in parts:
            quantizer(part)
        codebook.update()
        weights.append(quantizer.embedding.weight)
    torch.testing.assert_close(*weights)


def test_perplexity_is_that_of_the_codes_used():
    quantizer, codebook, _ = make(torch.eye(4))
    quantizer(latents_of([1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]))
    assert codebook.update()["perplexity"] == pytest.approx(2.0)


def test_unquantised_steps_pass_unit_latents_on_with_their_gradient():
    quantizer, _, _ = make(torch.eye(2), steps=0, unquantised_steps=3)
    latents = latents_of([3.0, 4.0]).requires_grad_()
    quantized, vq_loss, commit_loss, _ = quantizer(latents)
    torch.testing.assert_close(quantized.flatten(), torch.tensor([0.6, 0.8]))
    assert vq_loss == commit_loss == 0
    quantized[0, 0].sum().backward()
    expected = torch.autograd.functional.jacobian(lambda x: F.normalize(x, dim=0), torch.tensor([3.0, 4.0]))[0]
    torch.testing.assert_close(latents.grad.flatten(), expected)


def test_codes_are_set_from_encoded_images_after_the_unquantised_steps():
    quantizer, codebook, step = make(torch.eye(4), steps=0, unquantised_steps=2)
    latents = torch.randn(1, 4, 4, 4)
    for _ in range(2):
        before = quantizer.embedding.weight.clone()
        quantizer(latents)
        step.steps += 1
        codebook.update()
        assert torch.equal(before, quantizer.embedding.weight) == (step.steps < 2)
    unit = F.normalize(latents, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    similarity = F.normalize(quantizer.embedding.weight, dim=1) @ unit.T
    torch.testing.assert_close(similarity.max(dim=1).values, torch.ones(4))
    assert len(similarity.argmax(dim=1).unique()) == 4, "each code from a latent of its own"
    lengths = quantizer.embedding.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 16 / 4), msg="as if used as often as the others")
    quantizer.eval()
    quantized, *_ = quantizer(latents)
    assert not torch.allclose(quantized, F.normalize(latents, dim=1)), "quantised from now on"


def test_a_code_out_of_use_moves_to_a_badly_coded_latent():
    codes = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, -0.2, -0.2]])
    quantizer, codebook, _ = make(codes, codebook_ema=0.5, restart_threshold=0.15)
    poor = [0.0, 0.0, 1.0]  # a right angle to every code; the others are coded without error
    quantizer(latents_of(*[[1.0, 0, 0]] * 30, *[[0, 1.0, 0]] * 30, poor))
    metrics = codebook.update()
    assert metrics["codes_restarted"] == 1
    torch.testing.assert_close(quantizer.embedding.weight[2], torch.tensor(poor))


def test_a_skipped_step_leaves_the_codes_alone():
    quantizer, codebook, step = make(torch.eye(4))
    quantizer(torch.full((1, 4, 2, 2), torch.nan))
    step.skipped_in_a_row = 1
    codebook.update()
    assert torch.equal(quantizer.embedding.weight, torch.eye(4))


def test_gradient_training_leaves_the_codes_to_the_optimizer():
    quantizer, codebook, _ = make(torch.eye(4), codebook_update="gradient")
    quantizer(torch.randn(1, 4, 4, 4))
    codebook.update()
    assert torch.equal(quantizer.embedding.weight, torch.eye(4))


def test_evaluation_is_not_watched():
    quantizer, codebook, _ = make(torch.eye(4), restart_threshold=0.0)
    quantizer.eval()
    quantizer(torch.randn(1, 4, 4, 4))
    quantizer.train()
    quantizer(latents_of([1.0, 0, 0, 0]))
    assert codebook.update()["perplexity"] == pytest.approx(1.0)
