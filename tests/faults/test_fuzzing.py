"""Bad input without an end, by hypothesis: all of it ends in lines for the user, none in another error or a hang.

`GRPO_FUZZ_SECONDS=600 pytest -m faults tests/faults/test_fuzzing.py` looks longer. What is found becomes a case of the
tests of what it broke.
"""

import faulthandler
import io
import os
import random
import shutil
import string
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from PIL import Image

from grpo.config import RECIPES, SHIPPED_RECIPES, Data, UserError, job_of_file, load_recipe
from grpo.config.keys import section_keys
from grpo.data import build_dataset
from grpo.evaluation import open_images
from grpo.formats import read_config, save_weights
from grpo.models import GPT, MODEL_SPECS, Classifier, ClassifierConfig, load_classifier, load_gpt

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

SECONDS = float(os.environ.get("GRPO_FUZZ_SECONDS", 70)) / 7  # of each test
HANGS = 20  # seconds of one input

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63, 1e308, 1e-320, 1e300])
LEAVES = NUMBERS | st.booleans() | st.text() | st.sampled_from(["", "none", "/dev/zero", "x" * 300, "\0", "/", "."])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
CONFIG = MODEL_SPECS["GPT-tiny"].config(image_size=32, downsample_size=8, vocab_size=16, num_classes=3)


def fuzz(strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    """Check inputs for `SECONDS`; a UserError of plain lines is as good as none."""
    end, count = time.monotonic() + SECONDS, 0

    def run(value: Any) -> None:
        nonlocal count
        count += 1
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            check(value)
        except UserError as error:
            for line in error.problems:
                assert line.isprintable() and len(line) < 4000, line[:4000]  # noqa: PT018
        finally:
            faulthandler.cancel_dump_traceback_later()

    batch = int(time.time())
    while time.monotonic() < end:
        batch += 1
        settings = hypothesis.settings(
            max_examples=30, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        hypothesis.seed(batch)(settings(given(strategy)(run)))()
    print(f"{count} inputs")


def keys_of(job: str) -> list[str]:
    return list(section_keys(RECIPES[job].sections()))


JOBS = st.sampled_from(sorted(RECIPES))
SETTINGS = JOBS.flatmap(
    lambda job: st.tuples(st.just(job), st.dictionaries(st.sampled_from(keys_of(job)), VALUES, max_size=5))
)


def test_recipes_by_structure(tmp_path):
    def check(given: tuple[str, dict[str, Any]]) -> None:
        job, values = given
        content: dict[str, Any] = {}
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            content.setdefault(section, {})[name] = value
        try:
            (tmp_path / "recipe.toml").write_text(tomli_w.dumps(content))
        except (UnicodeEncodeError, ValueError):  # surrogates, which no file has
            return
        load_recipe(RECIPES[job], ["--config", str(tmp_path / "recipe.toml")], needs_files=True)

    fuzz(SETTINGS, check)


def test_recipes_by_text(tmp_path):
    texts = [file.read_bytes() for file in sorted(SHIPPED_RECIPES.glob("**/*.toml"))]
    assert all(tomllib.loads(text.decode()) for text in texts)

    def check(content: bytes) -> None:
        (tmp_path / "recipe.toml").write_bytes(content)
        job = job_of_file(str(tmp_path / "recipe.toml")) or "train"
        load_recipe(RECIPES[job], ["--config", str(tmp_path / "recipe.toml")], needs_files=True)

    fuzz(mutated(texts) | st.binary(max_size=200) | st.text(string.printable).map(str.encode), check)


def test_flags():
    def check(given: tuple[str, list[tuple[str, str]]]) -> None:
        job, flags = given
        load_recipe(RECIPES[job], [word for flag in flags for word in flag if word], needs_files=True)

    flags = JOBS.flatmap(
        lambda job: st.tuples(
            st.just(job),
            st.lists(
                st.tuples(
                    st.sampled_from([f"--{key}" for key in [*keys_of(job), "config", "reward.a.kind"]]) | st.text(),
                    LEAVES.map(str).filter(lambda text: not text.startswith("-h") and "--help" not in text),
                ),
                max_size=6,
            ),
        )
    )
    fuzz(flags, check)


def mutated(wholes: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of one of these with a few changed, left out, doubled or cut off."""

    def change(given: tuple[bytes, int, int]) -> bytes:
        content, seed, edits = bytearray(given[0]), given[1], given[2]
        chance = random.Random(seed)
        for _ in range(edits):
            end = chance.choice([len(content), min(300, len(content))])  # headers are where it matters
            place = chance.randrange(max(end, 1))
            place = len(content) - place if chance.random() < 0.3 else place
            match chance.randrange(5):
                case 0 | 1:
                    content[place : place + 1] = bytes([chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])])
                case 2:
                    content[place : place + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"])
                case 3:
                    del content[place : place + chance.randrange(1, 64)]
                case 4:
                    content[place:place] = content[place : place + chance.randrange(1, 64)]
        return bytes(content)

    return st.tuples(st.sampled_from(wholes), st.integers(0, 2**32), st.integers(1, 8)).map(change)


def test_weights(tmp_path):
    torch.manual_seed(0)
    wholes = []
    for name in ("a.pt", "a.safetensors"):
        save_weights(tmp_path / name, GPT(CONFIG).state_dict(), config=CONFIG)
        wholes.append((tmp_path / name).read_bytes())
    save_weights(tmp_path / name, Classifier(ClassifierConfig(width=8, num_classes=2)).state_dict())
    wholes.append((tmp_path / name).read_bytes())

    def check(content: bytes) -> None:
        for suffix in (".pt", ".safetensors"):
            path = tmp_path / f"b{suffix}"
            path.write_bytes(content)
            for load in (lambda path: load_gpt(path, CONFIG), load_gpt, load_classifier, read_config):
                try:
                    load(path)
                except UserError as error:
                    assert all(line.isprintable() for line in error.problems), error.problems  # noqa: PT017

    fuzz(mutated(wholes), check)


def encoded_images() -> list[bytes]:
    image, contents = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)), []
    for kind in ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "EPS", "ICO", "PCX"):
        image.save(buffer := io.BytesIO(), kind)
        contents.append(buffer.getvalue())
    return contents


def test_images(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x.png"
    file.touch()
    dataset = build_dataset(Data(name="folder", path=str(tmp_path), image_size=16), num_classes=1)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        assert dataset[0][0].shape == (3, 16, 16)

    fuzz(mutated(encoded_images()), check)


def test_saved_datasets(tmp_path):
    contents = encoded_images()[:3]
    rows = datasets.Dataset.from_dict({"image": contents, "label": [0, 1, 0]})
    rows.save_to_disk(tmp_path / "whole")
    wholes = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}

    def check(given: tuple[str, bytes]) -> None:
        name, content = given
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for other, whole in wholes.items():
            (folder / other).write_bytes(content if other == name else whole)
        dataset = build_dataset(Data(name="huggingface", path=str(folder), image_size=16), num_classes=2)
        for index in range(len(dataset)):
            try:
                dataset[index]
            except UserError as error:
                assert str(error).isprintable()  # noqa: PT017

    of_a_file = [st.tuples(st.just(name), mutated([whole])) for name, whole in wholes.items()]
    fuzz(st.one_of(of_a_file), check)


def test_npz(tmp_path):
    arrays = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.arange(2), "mu": np.zeros(4), "sigma": np.eye(4)}
    wholes = []
    for save in (np.savez, np.savez_compressed):
        save(buffer := io.BytesIO(), **arrays)
        wholes.append(buffer.getvalue())
    np.save(buffer := io.BytesIO(), arrays["arr_0"])
    wholes.append(buffer.getvalue())
    odd = st.sampled_from([
        np.array(["a", "b"]), np.array([1.5, 2]), np.array([None, {}], object), np.array([2**40, -1]), np.array(3),
        np.zeros((0, 4, 4, 3), np.uint8), np.array([np.nan, 1]), np.zeros((2, 2), complex), np.zeros(0),
        np.array([(1, 2)], [("a", int), ("b", int)]), np.array(["2020-01-01"] * 2, "M8"), np.ones(2, bool),
    ])  # fmt: skip

    def check(given: bytes | dict[str, np.ndarray]) -> None:
        path = Path(tmp_path / "a.npz")
        if isinstance(given, dict):
            np.savez(path, **(arrays | given))
        else:
            path.write_bytes(given)
        assert open_images(path).pixels(0, 2).dtype == torch.uint8

    fuzz(mutated(wholes) | st.dictionaries(st.sampled_from(sorted(arrays)), odd, min_size=1), check)
