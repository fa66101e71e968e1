"""The tokenizer computes LlamaGen's numbers; its codebook is compared by angle alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from grpo.models import TOKENIZER_SPECS, VQConfig, VQModel, fold_upsampling, load_vq, save_weights

ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def tiny_vq(**sizes) -> VQModel:
    torch.manual_seed(0)
    defaults = {"codebook_size": 16, "codebook_embed_dim": 4, "ch": 8, "ch_mult": (1, 2), "z_channels": 8}
    return VQModel(VQConfig(**(defaults | {"num_res_blocks": 1, "norm_groups": 4} | sizes)))


@torch.no_grad()
def test_codes_latents_and_images_are_llamagens(named_vq, expected):
    name, model = named_vq
    codes = model.encode(expected[f"{name}_images"])
    assert torch.equal(codes, expected[f"{name}_indices"])
    assert_close(model.lookup(codes), expected[f"{name}_quantized"], rtol=1e-6, atol=1e-6)
    assert_close(model.decode(codes), expected[f"{name}_decoded"], **ROUNDING)


@torch.no_grad()
def test_training_losses_are_llamagens(named_vq, expected):
    name, model = named_vq
    reconstruction, vq_loss, commit_loss, codes = model.train()(expected[f"{name}_images"])
    assert_close(reconstruction, expected[f"{name}_decoded"], **ROUNDING)
    assert_close(vq_loss, expected[f"{name}_vq_loss"])
    assert_close(commit_loss, expected[f"{name}_commit_loss"])
    assert torch.equal(codes, expected[f"{name}_indices"])


@torch.no_grad()
def test_codes_of_patches_depend_on_nothing_else(tmp_path):
    config = TOKENIZER_SPECS["VQ-shapes"].config(codebook_size=64)
    torch.manual_seed(0)
    model = VQModel(config).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    images[1, :, 4:8, 8:12] = images[0, :, 4:8, 8:12]  # code 1 * 4 + 2
    codes = model.encode(images)
    assert codes[0, 6] == codes[1, 6]
    assert not torch.equal(codes[0], codes[1])
    decoded = model.decode(torch.stack([codes[0], codes[0].index_fill(0, torch.tensor([15]), 0)]))
    assert (decoded[0, :, :4, :4] != decoded[1, :, :4, :4]).any()  # the decoder sees all codes
    save_weights(tmp_path / "plain.safetensors", model.state_dict())
    assert torch.equal(load_vq(tmp_path / "plain.safetensors", config).encode(images), codes)
    for sizes in (config, tiny_vq().config):
        save_weights(tmp_path / "vq.safetensors", VQModel(sizes).state_dict(), config=sizes)
        assert load_vq(tmp_path / "vq.safetensors").config == sizes
    with pytest.raises(ValueError, match="patch_encoder takes one level"):
        TOKENIZER_SPECS["VQ-digits"].config(patch_encoder=True)


@torch.no_grad()
def test_folded_upsampling_decodes_the_same():
    model = tiny_vq(ch_mult=(1, 1, 2)).double()
    codes = torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = model.decode(codes)
    fold_upsampling(model.decoder)
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in model.decoder.modules()) == 2
    assert_close(model.decode(codes), plain, rtol=1e-10, atol=1e-12)


def test_each_loss_reaches_its_own_side_of_the_codebook():
    model = tiny_vq()
    reconstruction, vq_loss, commit_loss, _ = model(torch.rand(2, 3, 8, 8) * 2 - 1)

    def reached(loss: torch.Tensor) -> set[str]:
        model.zero_grad()
        loss.backward(retain_graph=True)
        return {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert reached(vq_loss) == {"quantize"}
    assert reached(commit_loss) == {"encoder", "quant_conv"}
    assert reached(reconstruction.square().mean()) == {"encoder", "quant_conv", "post_quant_conv", "decoder"}


@torch.no_grad()
def test_only_the_angle_of_a_code_counts():
    model = tiny_vq().eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codes = model.encode(images)
    decoded = model.decode(codes)
    model.quantize.embedding.weight.mul_(torch.rand(16, 1) + 0.5)
    assert torch.equal(model.encode(images), codes)
    assert_close(model.decode(codes), decoded)


@torch.no_grad()
def test_nearest_finds_the_closest_unit_vector_in_any_number_of_rows():
    model = tiny_vq(codebook_size=7)
    vectors = torch.randn(20_000, 4) * 3
    distances = torch.cdist(F.normalize(vectors, dim=-1).double(), model.quantize.codebook().double())
    chosen = distances.gather(1, model.quantize.nearest(vectors)[:, None])[:, 0]
    assert_close(chosen, distances.min(1).values, rtol=0, atol=1e-6)


@torch.no_grad()
def test_autocast_does_not_change_the_lookup():
    model = tiny_vq()
    vectors = torch.randn(1000, 4)
    codes = model.quantize.nearest(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.quantize.nearest(vectors), codes)


@torch.no_grad()
def test_usage_counts_the_codes_of_training_only():
    model = tiny_vq().eval()
    quantizer = model.quantize
    model(torch.rand(2, 3, 8, 8))
    assert quantizer.usage() == 1 / 16  # the empty window is all code 0
    quantizer.remember(torch.tensor([[3, 5], [5, 9]]))
    assert quantizer.usage() == 4 / 16
    quantizer.remember(torch.full((70_000,), 7))
    assert quantizer.usage() == 1 / 16
    model.train()(torch.rand(2, 3, 8, 8))
    assert quantizer.codebook_used[-32:].ne(7).any()


@torch.no_grad()
def test_patches_are_folded_before_and_unfolded_after_all_convolutions():
    config = TOKENIZER_SPECS["VQ-digits"].config(codebook_size=256)
    model = VQModel(config).eval()
    largest = 0

    def look(module, inputs, output):
        nonlocal largest
        largest = max(largest, inputs[0].shape[-1], output.shape[-1])

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    codes = model.encode(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 64)
    assert model.decode(codes).shape == (2, 3, 32, 32)
    assert largest <= 17  # 16, and the padding of the strided convolution


@torch.no_grad()
def test_latents_decode_without_the_codebook():
    model = tiny_vq(patch_size=2).eval()
    codes = torch.arange(16).view(1, 16)
    assert torch.equal(model.decode_latents(model.lookup(codes)), model.decode(codes))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 9, 8), (1, 3, 8, 7)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="sides that 2 divides"):
        tiny_vq().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 15), (16,), (1, 4, 4)])
def test_codes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="square T"):
        tiny_vq().decode(torch.zeros(shape, dtype=torch.long))


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="norm_groups"):
        VQConfig(ch=48)
