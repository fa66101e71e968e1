"""A generator in one folder: in, out, asked, and what is not one."""

import json
from pathlib import Path

import huggingface_hub.hub_mixin
import numpy as np
import pytest
import safetensors.torch
import torch

from grpo.config import UserError
from grpo.jobs import generate
from grpo.models import TOKENIZER_SPECS, VQModel
from grpo.sharing import ImageGenerator
from grpo.texts import T5Encoder, WordEncoder
from tests.sharing.tiny import run_folder, tiny_gpt, tiny_tokenizer
from tests.texts.tiny_t5 import WIDTH, save_tiny_t5

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared generator of three classes."""
    folder = tmp_path_factory.mktemp("shared") / "tiny"
    ImageGenerator(tiny_gpt(), tiny_tokenizer(), device=CPU).save_pretrained(folder)
    return folder


def load(folder: Path, **others: object) -> ImageGenerator:
    return ImageGenerator.from_pretrained(folder, device=CPU, precision="fp32", **others)


def pixels(images: list) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.safetensors",
    }  # fmt: skip
    loaded = load(folder)
    for found, wanted in ((loaded.model, tiny_gpt()), (loaded.tokenizer, tiny_tokenizer())):
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
        assert found.config == wanted.config
    assert loaded.class_names == ("cat", "dog", "dog")


def test_images_are_those_of_grpo_generate(tmp_path: Path) -> None:
    """Of a run, with its own guidance and temperature, by class id or name, seed after seed."""
    run = run_folder(tmp_path / "run")
    generate.main([str(run), "--output.npz", str(tmp_path / "a.npz"), "--output.num_images", "5",
                   "--sampling.class_ids", "2,0", "--sampling.seed", "7"])  # fmt: skip
    with np.load(tmp_path / "a.npz") as arrays:
        wanted = arrays["arr_0"]
    generator = ImageGenerator.of_run(run, device=CPU)
    assert np.array_equal(pixels(generator(classes=[2, "cat"], num_images=5, seed=7)), wanted)
    assert not np.array_equal(pixels(generator(classes=[2, "cat"], num_images=5, seed=8)), wanted)
    generator.save_pretrained(tmp_path / "shared")
    again = load(tmp_path / "shared")
    assert (again.sampling.cfg_scale, again.sampling.temperature) == (2.0, 0.5)
    assert np.array_equal(pixels(again(classes=[2, 0], num_images=5, seed=7, batch_size=2)), wanted)
    assert not np.array_equal(pixels(again(classes=[2, 0], num_images=5, seed=7, cfg_scale=1.0)), wanted)


def test_mistakes_in_asking(folder: Path) -> None:
    generator = load(folder)
    for asked, message in (
        ({"classes": [3]}, "class ids are 0 to 2"),
        ({"classes": ["dog"]}, "give one of 1, 2"),
        ({"classes": ["caat"]}, "did you mean cat"),
        ({"classes": "cat"}, "a list"),
        ({"classes": []}, "nothing is asked for"),
        ({"prompts": ["a cat"]}, "takes classes"),
        ({"classes": [0], "num_images": 0}, "num_images = 0"),
        ({"classes": [0], "temperature": 0}, "temperature"),
        ({"classes": [0], "top_p": 1.5}, "top_p"),
        ({"classes": [0], "seed": -1}, "seed"),
    ):
        with pytest.raises(UserError, match=message):
            generator(**asked)


def text_generator(encoder: WordEncoder | T5Encoder | None) -> ImageGenerator:
    gpt = tiny_gpt(cls_token_num=6, caption_dim=WIDTH)
    return ImageGenerator(gpt, tiny_tokenizer(), encoder=encoder, device=CPU)


def test_words_need_nothing_else(tmp_path: Path) -> None:
    generator = text_generator(WordEncoder(rows=6, width=WIDTH))
    generator.save_pretrained(tmp_path)
    wanted = pixels(generator(prompts=["a red dot", "two dots"], num_images=3))
    assert np.array_equal(pixels(load(tmp_path)(prompts=["a red dot", "two dots"], num_images=3)), wanted)
    with pytest.raises(UserError, match="takes prompts"):
        generator(classes=[0])
    with pytest.raises(UserError, match="finds no word"):
        generator(prompts=["..."])


def test_a_t5_is_given_and_recognised(tmp_path: Path) -> None:
    sizes = {"rows": 6, "width": WIDTH, "max_tokens": 4, "device": CPU, "precision": "fp32"}
    t5 = save_tiny_t5(tmp_path / "t5")
    generator = text_generator(T5Encoder(t5, **sizes))
    generator.save_pretrained(tmp_path / "shared")
    wanted = pixels(generator(prompts=["a red dot left of a blue one"]))
    loaded = load(tmp_path / "shared", text_path=t5)
    assert np.array_equal(pixels(loaded(prompts=["a red dot left of a blue one"])), wanted)
    without = load(tmp_path / "shared")
    with pytest.raises(UserError, match="text_path"):
        without(prompts=["a red dot"])
    without.save_pretrained(tmp_path / "again")  # what the encoder has to be is not forgotten
    again, shared = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "shared"))
    assert again == shared
    torch.manual_seed(99)
    with pytest.raises(UserError, match="not the text encoder"):
        load(tmp_path / "shared", text_path=save_tiny_t5(tmp_path / "other", seed=1))


def test_nothing_is_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("me/digits", str(tmp_path / "missing"), "a/b/c"):
        with pytest.raises(UserError, match="nothing is downloaded unasked"):
            ImageGenerator.from_pretrained(name, cache_dir=tmp_path / "cache")
    assert not asked
    with pytest.raises(UserError, match="me/digits cannot be fetched from the Hub"):
        ImageGenerator.from_pretrained("me/digits", download=True, cache_dir=tmp_path / "cache")
    assert asked


def test_a_download_fetches_known_files_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fetch(name: str, **others: object) -> str:
        asked.update(others, name=name)
        return str(folder)

    monkeypatch.setattr("grpo.sharing.image_generator.snapshot_download", fetch)
    loaded = ImageGenerator.from_pretrained("me/digits", download=True, revision="v1", device=CPU)
    assert loaded.class_names == ("cat", "dog", "dog")
    assert (asked["name"], asked["revision"]) == ("me/digits", "v1")
    assert not any(name.endswith((".py", ".bin", ".pt", "*")) for name in asked["allow_patterns"])


class FakeHub:
    """Keeps what would have been sent."""

    sent: dict

    def __init__(self, token: object = None) -> None:
        pass

    def create_repo(self, repo_id: str, **others: object) -> "FakeHub":
        FakeHub.sent = {"private": others["private"]}
        self.repo_id = repo_id
        return self

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
        FakeHub.sent |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", FakeHub)
    return FakeHub


def test_push_sends_the_folder_with_the_card_as_it_was_edited(folder: Path, tmp_path: Path, hub: type[FakeHub]) -> None:
    generator = load(folder)
    generator.files["README.md"] = b"---\nlicense: mit\n---\n# Mine\n"
    generator.save_pretrained(tmp_path)
    assert load(tmp_path).push_to_hub("me/mine", private=True) == "https://hub/me/mine"
    assert hub.sent.pop("private") is True
    assert hub.sent == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert hub.sent["README.md"].endswith(b"# Mine\n")


def test_networks_that_are_no_pair() -> None:
    other = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=16))
    with pytest.raises(UserError, match="draws 32 codes, the tokenizer has 16"):
        ImageGenerator(tiny_gpt(), other, device=CPU)
    with pytest.raises(UserError, match="not a pair"):
        text_generator(WordEncoder(rows=6, width=WIDTH * 2))


def changed(config: dict, *keys: str, value: object) -> str:
    *parents, last = keys
    part = config
    for key in parents:
        part = part[key]
    part[last] = value
    return json.dumps(config)


HOSTILE = {
    "unknown key": (["trust_remote_code"], True),
    "unknown part": (["generator", "auto_map"], {"AutoModel": "evil.py"}),
    "other format": (["format"], 2),
    "unknown architecture": (["generator", "architecture"], "os.system"),
    "giant": (["generator", "sizes", "dim"], 2**40),
    "other size": (["generator", "sizes", "n_layer"], 3),
    "unknown size": (["generator", "sizes", "path"], "/etc/passwd"),
    "size of a wrong type": (["tokenizer", "sizes", "codebook_size"], "32"),
    "sizes that are none": (["generator", "sizes"], [1]),
    "no temperature": (["sampling"], {"temperature": 0}),
    "an infinite one": (["sampling"], {"temperature": float("inf")}),
    "a file to read": (["sampling"], {"prompts": "/etc/passwd"}),
    "another key of sampling": (["sampling"], {"batch_size": 2**30}),
    "a path for texts": (["text"], {"encoder": "t5", "width": 8, "path": "/tmp"}),
    "texts for a model of classes": (["text"], {"encoder": "words", "width": 8, "version": 2}),
    "a giant text": (["text"], {"encoder": "t5", "width": 2**62}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    keys, value = HOSTILE[case]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    text = changed(json.loads((folder / "config.json").read_text()), *keys, value=value)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    (line,) = caught.value.problems
    assert keys[-1] in line or "pair" in line, line


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"format": 1}', "\xff", " " * (2**22 + 1)])
def test_a_config_that_is_none_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not that of a shared generator"):
        load(tmp_path)


def test_weights_are_safetensors_with_their_sizes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({"model": tiny_gpt().state_dict()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a readable"):
        load(tmp_path)
    safetensors.torch.save_file(tiny_gpt().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="nothing in it says its sizes"):
        load(tmp_path)
