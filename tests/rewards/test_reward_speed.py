"""What makes rewards fast changes no ranking: low precision, work once an image, batches by memory."""

import pytest
import torch
from torch import nn

from grpo.config import Compile, Rewards
from grpo.models import TOKENIZER_SPECS, ClassCondition, Classifier, ClassifierConfig, VQModel, save_weights
from grpo.rewards import RewardSum, build_rewards, networks
from grpo.rewards.class_log_prob import ClassLogProb
from grpo.rewards.embedding_cosine import EmbeddingCosine
from grpo.rewards.networks import decode_batch, reward_dtype
from grpo.rewards.reconstruction import Reconstruction

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=256)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def groups():
    """8 groups of 16 random completions of 32 x 32 pixels, and their real images."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (8, 16, 64), generator=generator)
    condition = ClassCondition(torch.zeros(8, dtype=torch.int64))
    return tokens, condition, torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1


NEAR = {"near": Reconstruction.Settings(kind="reconstruction")}
COSINE = {"cosine": EmbeddingCosine.Settings(kind="embedding_cosine")}


def build(tokenizer, tables=NEAR, *, compile=False, **keys):
    return build_rewards(
        Rewards(**tables, **keys),
        tokenizer,
        class_names=[str(i) for i in range(10)],
        device=CPU,
        compile=Compile(enabled=compile),
    )


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_bf16_ranks_completions_as_fp32_does(tokenizer, groups, distance):
    """Of the pairs of a group whose rewards differ by more than 1 %, at least 99 % are in the same order."""
    tables = {"near": Reconstruction.Settings(kind="reconstruction", distance=distance)}
    exact, low = (build(tokenizer, tables, precision=precision)(*groups).total for precision in ("fp32", "bf16"))
    assert not torch.equal(exact, low)

    def differences(rewards):
        return rewards[:, :, None] - rewards[:, None, :]  # [B, G, G]

    smaller = torch.minimum(exact.abs()[:, :, None], exact.abs()[:, None, :])
    clear = differences(exact).abs() > 0.01 * smaller
    assert clear.sum() > 500
    same = differences(exact).sign() == differences(low).sign()
    assert same[clear].float().mean() >= 0.99


def test_low_precision_leaves_the_tokenizer_that_finds_codes_alone(tokenizer):
    rewards = build(tokenizer, precision="bf16")
    weight = rewards.tokenizer.decoder.conv_in.weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert build(tokenizer, precision="fp32").tokenizer is tokenizer


def test_auto_precision_is_bf16_on_a_gpu_only():
    assert reward_dtype("auto", CUDA) == reward_dtype("bf16", CPU) == torch.bfloat16
    assert reward_dtype("auto", CPU) == reward_dtype("fp32", CUDA) == torch.float32


@pytest.mark.parametrize("batch_size", [16, 40, 64, 0])
def test_each_real_image_is_encoded_once(tokenizer, groups, batch_size, monkeypatch):
    encoded = []
    encode = tokenizer.encode_latents
    monkeypatch.setattr(tokenizer, "encode_latents", lambda images: encoded.append(images) or encode(images))
    terms = build(tokenizer, NEAR | COSINE).terms
    total = RewardSum(tokenizer, terms, batch_size=batch_size)(*groups).total
    assert torch.equal(torch.cat(encoded), groups[2])
    one_by_one = RewardSum(tokenizer, terms, batch_size=5)(*groups).total  # cuts through groups
    torch.testing.assert_close(total, one_by_one, rtol=1e-5, atol=1e-6)


def test_batch_follows_free_memory(monkeypatch):
    """VQ-16 at 384 pixels: 128 channels of 384 x 384 pixels, six times, in half of the memory."""
    config, codes = TOKENIZER_SPECS["VQ-16"].config(), 24 * 24
    for gib, expected in ((10, 23), (1000, (2**31 - 1) // (128 * 384**2)), (0, 1)):
        monkeypatch.setattr(networks, "free_memory", lambda device, gib=gib: gib * 2**30)
        assert decode_batch(config, codes, dtype=torch.bfloat16, device=CUDA) == expected
    assert decode_batch(config, codes, dtype=torch.float32, device=CPU) == 64


def test_compilation_covers_the_networks_in_use(tokenizer, tmp_path, monkeypatch):
    save_weights(tmp_path / "c.safetensors", Classifier(ClassifierConfig(width=8)).state_dict())
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    classes = ClassLogProb.Settings(kind="class_log_prob", checkpoint=str(tmp_path / "c.safetensors"))
    build(tokenizer, {"class": classes})
    assert compiled == []
    build(tokenizer, {"class": classes}, compile=True)
    build(tokenizer, COSINE, compile=True)
    assert compiled == ["Decoder", "Classifier", "Decoder", "Encoder"]
