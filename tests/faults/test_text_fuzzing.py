"""Bad texts without an end, as in `test_fuzzing.py`: captions, prompts, features on disk, results of scorers."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from grpo.config import Data, Model, Text, UserError
from grpo.data import build_text_dataset
from grpo.evaluation import read_scores
from grpo.texts import FeatureStore, LlamaGenFeatures, read_prompts
from tests.faults.test_fuzzing import VALUES, fuzz, mutated
from tests.texts.test_store import write

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

MODEL, WORDS = Model(cls_token_num=4, caption_dim=4), Text(encoder="words")
FILES = {
    "metadata.jsonl": b'{"file_name": "0.png", "text": "a dog"}\n{"file_name": "1.png", "caption": ["x", "y"]}\n',
    "captions.json": b'{"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}',
    "list.jsonl": b'{"image_path": "0.png", "text": ["a dog", "a"]}\n',
    "0.txt": "a dog\nübung\n".encode(),
}


def test_captions(tmp_path):
    entries = st.lists(st.dictionaries(st.sampled_from(["file_name", "text", "caption", "id"]), VALUES, max_size=3))
    objects = entries.map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
    tables = (entries | VALUES).map(lambda value: json.dumps(value).encode())
    contents = mutated(list(FILES.values())) | objects | tables

    def check(given: tuple[str, bytes]) -> None:
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number in range(2):
            Image.new("RGB", (9, 9)).save(folder / f"{number}.png")
        (folder / given[0]).write_bytes(given[1])
        dataset = build_text_dataset(Data(path=str(folder), image_size=8, name="captions"), WORDS, MODEL)
        for index in range(min(len(dataset), 3)):
            try:
                dataset.request([index], [dataset.ask(index, 0, 0)])
                dataset[index]
            except UserError as error:
                assert all(line.isprintable() for line in error.problems), error.problems  # noqa: PT017

    fuzz(st.tuples(st.sampled_from(list(FILES)), contents), check)


def test_prompts_and_scores(tmp_path):
    results = b'{"tag": "a", "metadata": "m", "correct": true}\nModel: x\n\tentity: 80.5\nDPG-Bench score: 75.1\n'
    anything = VALUES.map(lambda value: json.dumps(value).encode())

    def check(given: tuple[str, bytes]) -> None:
        path = tmp_path / f"a{given[0]}"
        path.write_bytes(given[1])
        for read in (read_prompts, read_scores):
            try:
                read(path)
            except UserError as error:
                assert all(line.isprintable() for line in error.problems), error.problems  # noqa: PT017

    fuzz(st.tuples(st.sampled_from([".txt", ".jsonl"]), mutated([*FILES.values(), results]) | anything), check)


def test_features(tmp_path):
    folder = write(tmp_path / "f", ["text 1", "text 2"])
    np.save(tmp_path / "0.npy", np.ones((1, 3, 4), dtype=np.float32))
    wholes = {file.name: file.read_bytes() for file in (*folder.iterdir(), tmp_path / "0.npy")}

    def check(given: tuple[str, bytes]) -> None:
        name, content = given
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for other, whole in wholes.items():
            (copy / other).write_bytes(content if other == name else whole)
        if name == "0.npy":
            assert LlamaGenFeatures(tmp_path, rows=9, width=4).row("copy", 0).isfinite().all()
            return
        store = FeatureStore(copy, rows=4, width=4)
        for text in ("text 1", "text 2"):
            if not store.missing([text]):
                assert isinstance(store([text]).features, torch.Tensor)

    choices = [st.tuples(st.just(name), mutated([whole])) for name, whole in wholes.items()]
    fuzz(st.one_of(choices), check)
