"""Weights that are damaged, odd or hostile: a line that names the tensor, or weights that are right."""

import os
import stat

import pytest
import safetensors.torch
import torch

from grpo.config import UserError
from grpo.formats import read_weights, save_weights
from grpo.jobs import convert
from grpo.models import MODEL_SPECS, Classifier, ClassifierConfig, load_classifier, load_gpt

CONFIG = MODEL_SPECS["GPT-tiny"].config(image_size=32, downsample_size=8, vocab_size=16, num_classes=3)


@pytest.fixture(scope="module")
def weights():
    from grpo.models import GPT

    torch.manual_seed(0)
    return GPT(CONFIG).state_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_numbers_that_are_not_finite(weights, value, suffix, tmp_path):
    damaged = {name: tensor.clone() for name, tensor in weights.items()}
    damaged["norm.weight"][1] = value
    path = tmp_path / f"gpt{suffix}"
    save_weights(path, damaged)
    with pytest.raises(UserError, match=r"norm\.weight holds NaN or infinite numbers"):
        load_gpt(path, CONFIG)
    with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
        convert.main(["--convert.input", str(path), "--convert.output", str(tmp_path / "out.pt")])
    assert not (tmp_path / "out.pt").exists()


def test_a_classifier_that_is_not_finite(tmp_path):
    classifier = Classifier(ClassifierConfig(width=8, num_classes=2)).state_dict()
    classifier["head.weight"][0, 0] = float("nan")
    save_weights(tmp_path / "c.safetensors", classifier)
    with pytest.raises(UserError, match=r"head\.weight holds NaN"):
        load_classifier(tmp_path / "c.safetensors")


def test_a_classifier_of_absurd_sizes_is_not_built(tmp_path):
    weights = Classifier(ClassifierConfig(width=8, num_classes=2)).state_dict()
    weights["layers.0.conv1.weight"] = torch.empty(2**40, 0)
    save_weights(tmp_path / "c.safetensors", weights)
    with pytest.raises(UserError, match="not a classifier"):
        load_classifier(tmp_path / "c.safetensors")


ODD = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8),
    "complex64": lambda: torch.ones(4, dtype=torch.complex64),
    "meta": lambda: torch.empty(4, device="meta"),
    "more elements than are stored": lambda: torch.ones(1).expand(2**40),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("words", ODD)
def test_odd_tensors_of_a_pickle_are_named(words, tmp_path):
    torch.save({"model": {"norm.weight": ODD[words]()}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"norm\.weight .*{words}") as caught:
        read_weights(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_a_tensor_without_a_name(tmp_path):
    torch.save({"model": {3: torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="by the name 3"):
        read_weights(tmp_path / "a.pt")


def test_tied_weights_are_converted(tmp_path):
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared[2:]}, tmp_path / "a.pt")
    convert.main(["--convert.input", str(tmp_path / "a.pt"), "--convert.output", str(tmp_path / "a.safetensors")])
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in {"a": shared, "b": shared, "c": shared[2:]}.items())


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "folder"])
def test_files_of_weights_have_the_mode_of_other_files(mask, name, tmp_path):
    before = os.umask(mask)
    try:
        save_weights(tmp_path / name, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    files = list((tmp_path / name).glob("*.safetensors")) or [tmp_path / name]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


def test_random_damage_is_told_in_one_line(weights, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a.pt", "a.safetensors"):
        save_weights(tmp_path / name, weights, config=CONFIG)
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(3):
                place = int(torch.randint(2000, (), generator=generator))
                damaged[place if name == "a.safetensors" else -place - 1] = int(
                    torch.randint(256, (), generator=generator)
                )
            (tmp_path / name).write_bytes(damaged)
            try:
                load_gpt(tmp_path / name, CONFIG)
            except UserError as error:
                assert all("\n" not in line for line in error.problems)  # noqa: PT017


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_floats_of_any_width_are_read(weights, dtype, suffix, tmp_path):
    save_weights(tmp_path / f"a{suffix}", {name: tensor.to(dtype) for name, tensor in weights.items()})
    assert {tensor.dtype for tensor in load_gpt(tmp_path / f"a{suffix}", CONFIG).parameters()} == {torch.float32}
    classifier = Classifier(ClassifierConfig(width=8, num_classes=2)).state_dict()
    save_weights(tmp_path / f"c{suffix}", {name: tensor.to(dtype) for name, tensor in classifier.items()})
    assert load_classifier(tmp_path / f"c{suffix}")(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_numbers_that_are_not_finite_in_eight_bits(tmp_path):
    save_weights(tmp_path / "a.safetensors", {"norm.weight": torch.tensor([float("nan")]).to(torch.float8_e5m2)})
    with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
        convert.main(["--convert.input", str(tmp_path / "a.safetensors"), "--convert.output", str(tmp_path / "b.pt")])


@pytest.mark.parametrize("as_folder", [False, True])
def test_odd_tensors_of_safetensors_are_named(as_folder, tmp_path):
    safetensors.torch.save_file({"norm.weight": torch.ones(4, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight is strided complex64"):
        read_weights(tmp_path if as_folder else tmp_path / "a.safetensors")


def test_whole_numbers_are_not_weights(weights, tmp_path):
    """An 8-bit quantized model without its scales would be loaded, and draw noise."""
    save_weights(tmp_path / "a.safetensors", {name: tensor.to(torch.int8) for name, tensor in weights.items()})
    with pytest.raises(UserError, match="without floats"):
        load_gpt(tmp_path / "a.safetensors", CONFIG)


def test_a_name_without_end_is_cut(weights, tmp_path):
    save_weights(tmp_path / "a.safetensors", {**weights, "x" * 10**6: torch.ones(1)})
    with pytest.raises(UserError, match=r"a\.safetensors: the weights do not fit the model: 1 unknown") as caught:
        load_gpt(tmp_path / "a.safetensors", CONFIG)
    assert len(str(caught.value)) < 2500
