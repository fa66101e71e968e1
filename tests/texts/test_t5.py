"""A T5 encoder against transformers' own, and the features that it writes to disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config import UserError
from grpo.texts import FeatureStore, FeatureWriter, T5Encoder, clean_text
from tests.texts.tiny_t5 import WIDTH, save_tiny_t5

transformers = pytest.importorskip("transformers", reason="the extra [text] is not installed")

TEXTS = ["a red circle", "two small blue squares left of the large dog &amp; CAT", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def encoder(folder, *, most=120, width=None, precision="fp32"):
    sizes = {"rows": most, "width": width, "max_tokens": most}
    return T5Encoder(folder, device=torch.device("cpu"), precision=precision, **sizes)


def test_features_are_those_of_transformers(folder):
    """Each text alone and unpadded, against ours in one padded batch."""
    model = transformers.T5EncoderModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = encoder(folder).encode(TEXTS)
    plain = ["a red circle", "two small blue squares left of the large dog & cat", "the"]
    for text, features in zip(plain, found, strict=True):
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens).last_hidden_state[0]
        assert features.shape == (tokens.input_ids.shape[1], WIDTH)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut(folder):
    """The first tokens with the end of the text, as the tokenizer truncates; ten thousand words are no trouble."""
    long = " ".join(["red"] * 10_000)
    (features,) = encoder(folder, most=7).encode([long])
    assert features.shape == (7, WIDTH)
    (short,) = encoder(folder, most=7).encode([" ".join(["red"] * 6)])
    torch.testing.assert_close(features, short)


def test_weights_are_the_same_in_every_layout(folder, tmp_path):
    other = save_tiny_t5(tmp_path, safe=False)
    assert encoder(other).identity == encoder(folder).identity
    (shards := tmp_path / "shards").mkdir()
    for file in folder.iterdir():
        (shards / file.name.replace("model.safetensors", "model-00001-of-00001.safetensors")).symlink_to(file)
    assert encoder(shards).identity == encoder(folder).identity  # as the hub's own cache has them
    assert encoder(save_tiny_t5(tmp_path / "other", seed=1)).identity != encoder(folder).identity


def test_the_condition_is_padded_on_the_left(folder):
    condition = encoder(folder, most=6)(TEXTS)
    assert condition.mask.tolist() == [[False] * 2 + [True] * 4, [True] * 6, [False] * 4 + [True] * 2]
    assert condition.features[0, :2].eq(0).all()
    torch.testing.assert_close(condition.features[0, 2:], encoder(folder).encode(TEXTS[:1])[0])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"is not a folder of transformers' T5"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert'"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"has no model.safetensors, no shards .* and no pytorch_model.bin",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a readable .safetensors file"),
        (lambda folder: change(folder / "config.json", "d_ff", 16), "the weights are not those of its config.json"),
    ],
)
def test_what_is_no_t5_is_told(tmp_path, spoil, told):
    spoil(save_tiny_t5(tmp_path))
    with pytest.raises(UserError, match=told):
        encoder(tmp_path)


def test_weights_that_give_no_numbers_are_told(tmp_path):
    """As those of T5 v1.1 did where they had once been saved in fp16."""
    file = save_tiny_t5(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="gives features that are not finite of 'a Red circle'"):
        encoder(tmp_path).encode(["a Red circle"])


def change(file, key, value):
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def test_another_width_than_the_models_is_refused(folder):
    with pytest.raises(UserError, match=f"has features of width {WIDTH}, and model.caption_dim is 2048"):
        encoder(folder, width=2048)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_written_is_read(folder, tmp_path, precision):
    t5 = encoder(folder, precision=precision)
    writer = FeatureWriter(tmp_path / "f", encoder=t5.identity, width=WIDTH, max_tokens=120, precision=precision)
    assert writer.start() == set()
    writer.write(TEXTS[:1], t5.encode(TEXTS[:1]))
    writer.write(TEXTS[1:], t5.encode(TEXTS[1:]))
    with pytest.raises(UserError, match="is not finished: start the same `grpo encode-text` again"):
        FeatureStore(tmp_path / "f", rows=8, width=WIDTH)
    assert writer.start() == {writer.key(text) for text in TEXTS}
    assert writer.finish() == 3
    store = FeatureStore(tmp_path / "f", rows=8, width=WIDTH)
    assert (len(store), store.identity) == (3, t5.identity)
    assert store.missing([*TEXTS, "unknown", "unknown"]) == ["unknown"]
    for found, expected in zip(store.features(TEXTS), t5.features(TEXTS), strict=True):
        torch.testing.assert_close(found, expected[:8].float(), rtol=1e-2 if precision == "bf16" else 1e-4, atol=1e-2)


def test_empty_and_endless_texts_are_refused():
    for text, told in [(" \n\t", "the text is empty"), ("x" * (2**20 + 1), "more than 1048576"), (7, "a text is exp")]:
        with pytest.raises(UserError, match=f"here: .*{told}"):
            clean_text(text, "here")
    assert clean_text(" a\n b\ud800 ", "here") == "a b?"
