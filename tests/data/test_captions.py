"""Images with captions in each form, prompts alone, and what is wrong with some of them."""

import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import Data, EncodeRecipe, Model, Text, UserError
from grpo.data import build_dataset, build_stream, build_text_dataset, open_captions
from grpo.data.captions import Captions, pick_text
from grpo.parallel import World

MODEL = Model(cls_token_num=8, caption_dim=16)
WORDS = Text(encoder="words")
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
TEXTS = [f"picture number {index}" for index in range(6)]


@pytest.fixture
def pictures(tmp_path, make_images):
    """A folder of six images, numbered by their red value."""

    def make(folder="pictures"):
        (tmp_path / folder).mkdir()
        for index, image in enumerate(make_images(6)):
            image.save(tmp_path / folder / f"{index}.png")
        return tmp_path / folder

    return make


def lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def by_metadata(folder):
    entries = [{"file_name": f"{index}.png", "text": text} for index, text in enumerate(TEXTS)]
    (folder / "metadata.jsonl").write_text(lines(entries))


def by_table(folder):
    (folder / "captions.json").write_text(json.dumps({f"{index}.png": [text] for index, text in enumerate(TEXTS)}))


def as_coco(folder):
    images = [{"id": 10 + index, "file_name": f"{index}.png"} for index in range(6)]
    notes = [{"image_id": 10 + index, "caption": text} for index, text in enumerate(TEXTS)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes[::-1]}))


def beside(folder):
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(f"  {text}\n\n")


def as_llamagens(folder):
    entries = [{"image_path": str(folder / f"{index}.png"), "text": [text]} for index, text in enumerate(TEXTS)]
    (folder / "part0.jsonl").write_text(lines(entries[:4]))
    (folder / "part1.jsonl").write_text(lines(entries[4:]))


def found(dataset, count=6):
    """Red value -> text of each of the samples of an epoch, and the condition's rows agree with the text."""
    stream = build_stream(dataset, batch_size=count, seed=0, num_workers=0, world=ALONE)
    batch = next(stream).to("cpu")
    again = dataset.requests.encoder(list(batch.captions))
    assert torch.equal(batch.condition.features, again.features)
    assert torch.equal(batch.condition.mask, again.mask)
    red = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    return dict(zip(red, batch.captions, strict=True))


@pytest.mark.parametrize("write", [by_metadata, by_table, as_coco, beside, as_llamagens])
def test_forms_of_a_folder(pictures, section, write):
    folder = pictures()
    write(folder)
    dataset = build_text_dataset(section(folder), WORDS, MODEL)
    assert found(dataset) == dict(enumerate(TEXTS))
    assert build_text_dataset(section(folder, name="captions"), WORDS, MODEL).fingerprint == dataset.fingerprint


def test_captions_beside_images_in_folders(class_folders, section):
    folder = class_folders(["a", "b"], 3)
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        file.with_suffix(".txt").write_text(TEXTS[number])
    assert found(build_text_dataset(section(folder), WORDS, MODEL)) == dict(enumerate(TEXTS))
    assert len(build_dataset(section(folder), num_classes=2)) == 6  # which are classes for a model that takes them


def test_tars(tars, section):
    folder = tars(label=lambda index: ("txt", f"picture number {index}\n"))
    dataset = build_text_dataset(section(folder), WORDS, MODEL)
    assert found(dataset, 23) == {index: f"picture number {index}" for index in range(23)}
    assert found(build_text_dataset(section(folder), WORDS, MODEL), 23)[5] == "picture number 5"  # from the index
    folder = tars(label=lambda index: ("json", json.dumps({"mine": f"m {index}", "caption": "c"})))
    assert found(build_text_dataset(section(folder, caption_key="mine"), WORDS, MODEL), 23)[7] == "m 7"
    assert found(build_text_dataset(section(folder, index_cache="none"), WORDS, MODEL), 23)[7] == "c"


@pytest.mark.parametrize("name", ["webdataset", "stream"])
def test_lines_of_captions_are_those_of_a_text_file(tars, pictures, section, name):
    """Whatever the source, so that the same features are found: with a byte order mark, and other ends of lines."""
    content = "\ufeffone\u2028caption\x0c of two\r\nanother\rthird\n"
    wanted = ["one caption of two", "another", "third"]
    folder = pictures()
    for number in range(6):
        (folder / f"{number}.txt").write_text(content, encoding="utf-8", newline="")
    assert open_captions(section(folder)).captions_of.of(3) == wanted
    dataset = build_text_dataset(section(tars(label=lambda index: ("txt", content)), name=name), WORDS, MODEL)
    assert set(found(dataset, 23).values()) == set(wanted)


def test_a_saved_data_set_and_parquet_files(saved_dataset, parquet, make_images, section):
    columns = {"image": make_images(6), "text": [*TEXTS[:5], " "], "own": [[text, text] for text in TEXTS]}
    folder = saved_dataset(columns, features=datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "own": datasets.List(datasets.Value("string"))}
    ))  # fmt: skip
    dataset = build_text_dataset(section(folder), WORDS, MODEL)
    assert found(dataset, 5) == dict(enumerate(TEXTS[:5]))  # the last has no caption
    assert found(build_text_dataset(section(folder, caption_key="own"), WORDS, MODEL)) == dict(enumerate(TEXTS))
    folder = parquet(caption=lambda index: f"picture {index}" if index != 3 else None)
    dataset = build_text_dataset(section(folder), WORDS, MODEL)
    assert found(dataset, 22)[22] == "picture 22"
    assert len(dataset) == 22
    assert dataset.describe(3).startswith("row 4 of")  # in its file, though a row before it is left out
    with pytest.raises(UserError, match=r"has the columns .*; a caption is looked for in 'words'"):
        build_text_dataset(section(folder, caption_key="words"), WORDS, MODEL)


def test_a_stream(parquet, tars, section, caplog):
    folder = parquet(text=lambda index: f"picture number {index}")
    streamed = section(folder, name="stream", shuffle_window=8)
    assert found(build_text_dataset(streamed, WORDS, MODEL), 23) == {i: f"picture number {i}" for i in range(23)}
    folder = parquet(text=lambda index: {3: "!", 4: " "}.get(index, f"picture {index}"))
    assert {3, 4}.isdisjoint(found(build_text_dataset(section(folder, name="stream"), WORDS, MODEL), 20))
    assert "finds no word in '!'" in caplog.text
    assert "has no caption; the next image takes its place" in caplog.text
    folder = tars(label=lambda index: ("txt", f"picture number {index}\n"))
    dataset = build_text_dataset(section(folder, name="stream"), WORDS, MODEL)
    assert found(dataset, 23)[11] == "picture number 11"


def test_one_of_several_captions_is_drawn_by_the_samples_number():
    captions = Captions([["a", "b", "ü"], ["alone"]])
    assert captions.of(0) == ["a", "b", "ü"]
    assert captions.distinct() == ["a", "b", "ü", "alone"]
    drawn = [pick_text(captions.of(0), number, 7) for number in range(300)]
    assert drawn == [pick_text(captions.of(0), number, 7) for number in range(300)]
    assert all(70 < drawn.count(text) < 130 for text in captions.of(0))
    assert drawn != [pick_text(captions.of(0), number, 8) for number in range(300)]
    assert captions.fingerprint != Captions([["a", "b"], ["ü", "alone"]]).fingerprint


def test_workers_and_ranks_see_what_one_process_sees(pictures, section):
    folder = pictures()
    (folder / "captions.json").write_text(
        json.dumps({f"{index}.png": [text, f"the other {text}"] for index, text in enumerate(TEXTS)})
    )
    dataset = build_text_dataset(section(folder), WORDS, MODEL)
    alone = build_stream(dataset, batch_size=4, seed=3, num_workers=0, world=ALONE)
    expected = [text for _ in range(3) for text in next(alone).captions]
    assert len({text.startswith("the other") for text in expected}) == 2
    halves = []
    for rank in range(2):
        world = World(rank=rank, size=2, local_rank=rank, local_size=2, device=torch.device("cpu"))
        stream = build_stream(dataset, batch_size=4, seed=3, num_workers=rank, world=world)
        halves.append([next(stream) for _ in range(3)])
        stream.close()
    assert [text for pair in zip(*halves, strict=True) for half in pair for text in half.captions] == expected
    features = torch.cat([half.condition.features for pair in zip(*halves, strict=True) for half in pair])
    assert torch.equal(features, dataset.requests.encoder(expected).features)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("p.txt", "a dog\n\n a  cat \na dog\n", None),
        ("p.jsonl", lines([{"prompt": "a dog"}, {"prompt": "a cat"}, {"prompt": "a dog"}]), None),
        ("p.jsonl", lines([{"text": "x", "mine": word} for word in ("a dog", "a cat", "a dog")]), "mine"),
    ],
)
def test_prompts_alone(tmp_path, name, content, key):
    """The same prompt twice is asked for twice."""
    (tmp_path / name).write_text(content)
    data = Data(name="prompts", path=str(tmp_path / name), caption_key=key)
    dataset = build_text_dataset(data, WORDS, MODEL)
    stream = build_stream(dataset, batch_size=6, seed=0, num_workers=0, world=ALONE)
    batch = next(stream)
    assert batch.images.shape == (6, 3, 0, 0)
    assert sorted(batch.captions) == ["a cat", "a cat", "a dog", "a dog", "a dog", "a dog"]
    assert dataset.captions_of.distinct() == ["a dog", "a cat"]
    assert len(build_text_dataset(Data(path=str(tmp_path / name), caption_key=key), WORDS, MODEL)) == 3


def test_images_without_a_caption_are_left_out_and_counted(pictures, section, caplog):
    folder = pictures()
    beside(folder)
    (folder / "2.txt").unlink()
    (folder / "4.txt").write_text(" \n")
    assert set(found(build_text_dataset(section(folder), WORDS, MODEL), 4)) == {0, 1, 3, 5}
    assert "2.png has no caption (its 2.txt) (and 1 more such): left out" in caplog.text
    with pytest.raises(UserError, match=r"2.png has no caption .*more than data.max_bad_images = 1: write captions"):
        build_text_dataset(section(folder, max_bad_images=1), WORDS, MODEL)


def test_a_caption_of_ten_thousand_words_is_cut(pictures, section):
    folder = pictures()
    beside(folder)
    (folder / "0.txt").write_text(" ".join(f"word{number}" for number in range(10_000)))
    dataset = build_text_dataset(section(folder), WORDS, MODEL)
    condition, texts = dataset.request([0], [dataset.ask(0, 0, 0)])
    assert len(texts[0].split()) == 10_000
    assert condition.mask.all()
    short = dataset.requests.encoder([" ".join(texts[0].split()[:8])])
    assert torch.equal(condition.features, short.features)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a"}\n{"file_name": ',
            r"metadata.jsonl:2 is not a JSON obj",
        ),
        ("metadata.jsonl", '{"text": "a"}\n', "names no image: give its file in file_name"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": 7}\n', "a text is expected, not 7"),
        ("metadata.jsonl", '{"file_name": "\\ud800.png", "text": "a"}\n', "names no image"),
        ("metadata.jsonl", json.dumps({"file_name": "a" * 5000, "text": "a"}), "names no image"),
        ("metadata.jsonl", "", r"has no images with captions: metadata"),
        ("metadata.jsonl", '{"file_name": "0.png", "words": "a"}\n', r"no images with .*:1 \(0.png\) has no caption"),
        ("captions.json", "[1]", "is no table of captions"),
        ("captions.json", '{"images": [{"id": 1}], "annotations": []}', "is not as COCO's: file_name is missing"),
        ("captions.json", '{"images": [{"id": 1, "file_name": [1]}], "annotations": []}', "entry 0 names no image"),
        (
            "list.jsonl",
            '{"image_path": "0.png"}\n' * 101 + '{"image_path": "0.png", "text": "a"}',
            r"has no caption \(and 100 more such\), more than",
        ),
    ],
)
def test_what_is_wrong_in_a_folder_is_told(pictures, section, name, content, told):
    folder = pictures()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=told):
        build_text_dataset(section(folder), WORDS, MODEL)


def test_what_asks_in_another_way_than_the_model_is_told(pictures, class_folders, section):
    folder = pictures()
    beside(folder)
    with pytest.raises(UserError, match="holds images with captions, and this model takes classes"):
        build_dataset(section(folder), num_classes=3)
    with pytest.raises(UserError, match=r"has no images with captions: metadata.jsonl, captions.json"):
        build_text_dataset(section(class_folders(["a", "b"], 2)), WORDS, MODEL)
    assert len(build_dataset(section(folder), num_classes=None)) == 6  # where images alone matter


def features_of(folder, name, count, *, rows, width=16):
    (folder / name).mkdir(parents=True)
    for number in range(count):
        np.save(folder / name / f"{number}.npy", np.full((1, rows, width), number + rows, dtype=np.float32))


@pytest.fixture
def llamagens(pictures, tmp_path):
    """LlamaGen's lists and features: 3 rows of the long captions and 1 of the short ones."""
    folder = pictures()
    as_llamagens(folder)
    for name, count in (("part0", 4), ("part1", 2)):
        features_of(tmp_path / "long", name, count, rows=3)
        features_of(tmp_path / "short", name, count, rows=1)
    files = {"llamagen_features": str(tmp_path / "long"), "llamagen_short_features": str(tmp_path / "short")}
    return folder, Text(**files, short_share=0.4)


def test_llamagens_features(llamagens, section):
    folder, text = llamagens
    dataset = build_text_dataset(section(folder), text, MODEL)
    stream = build_stream(dataset, batch_size=6, seed=0, num_workers=0, world=ALONE)
    batches = [next(stream) for _ in range(60)]
    tokens = torch.cat([batch.condition.mask.sum(1) for batch in batches])
    assert set(tokens.tolist()) == {1, 3}
    assert 0.3 < (tokens == 1).float().mean() < 0.5
    batch = batches[0]
    numbers = torch.tensor([[0, 1, 2, 3, 0, 1][index] for index in batch.indices.tolist()])
    assert torch.equal(batch.condition.features[:, -1, 0].long(), numbers + batch.condition.mask.sum(1))
    listed = build_text_dataset(section(folder, first_list=1, last_list=1), text, MODEL)
    assert sorted(listed.captions_of.distinct()) == TEXTS[4:]


def test_features_of_another_encoder_are_told_by_the_first_of_a_list(llamagens, section):
    folder, text = llamagens
    before = build_text_dataset(section(folder), text, MODEL).requests.identity
    assert build_text_dataset(section(folder), text, MODEL).requests.identity == before
    np.save(folder.parent / "short" / "part1" / "0.npy", np.zeros((1, 3, 16), dtype=np.float32))
    after = build_text_dataset(section(folder), text, MODEL).requests.identity
    assert {key for key in before if before[key] != after[key]} == {"features"}
    (folder.parent / "long" / "part0" / "0.npy").unlink()  # is told when it is asked for
    assert build_text_dataset(section(folder), text, MODEL).requests.identity.keys() == after.keys()


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def archive(file):
    with file.open("wb") as opened:
        np.savez(opened, a=np.zeros(3))


def broken(folder, array):
    np.save(folder / "part0" / "1.npy", array)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "part0" / "1.npy").unlink(), "No such file"),
        (lambda folder: (folder / "part0" / "1.npy").write_bytes(b"x"), "cannot be read"),
        (lambda folder: broken(folder, np.zeros((1, 0, 16), dtype=np.float32)), "it has no token"),
        (lambda folder: broken(folder, np.zeros((1, 3, 8), dtype=np.float32)), "have width 8, model.caption_dim is 16"),
        (lambda folder: broken(folder, np.full((1, 3, 16), np.nan, dtype=np.float32)), "are not finite"),
        (lambda folder: broken(folder, np.array([{}])), "cannot be read: "),
        (lambda folder: pipe(folder / "part0" / "1.npy"), "it is a pipe or a device"),
        (lambda folder: archive(folder / "part0" / "1.npy"), "it is no .npy"),
    ],
)
def test_an_image_whose_features_are_missing_or_wrong_is_passed_over(llamagens, section, caplog, spoil, told):
    folder, text = llamagens
    spoil(Text.model_validate(text).llamagen_features and folder.parent / "long")
    dataset = build_text_dataset(section(folder), text.model_copy(update={"short_share": 0.0}), MODEL)
    stream = build_stream(dataset, batch_size=6, seed=0, num_workers=0, world=ALONE)
    assert TEXTS[1] not in next(stream).captions
    assert told in caplog.text


def test_llamagens_features_need_its_lists(pictures, section, llamagens):
    _, text = llamagens
    folder = pictures("others")
    beside(folder)
    with pytest.raises(UserError, match=r"are of LlamaGen's lists, and data.path .* has none"):
        build_text_dataset(section(folder), text, MODEL)


def test_texts_without_features_are_told_at_the_start(pictures, section, tmp_path):
    from tests.texts.test_store import write

    folder = pictures()
    beside(folder)
    features = write(tmp_path / "features", [f"text {number}" for number in range(3)])
    small = Model(cls_token_num=8, caption_dim=4)
    with pytest.raises(UserError, match=r"has no features of 'picture number 0' \(and 5 more texts\): add them"):
        build_text_dataset(section(folder), Text(features=str(features)), small)
    (folder / "metadata.jsonl").write_text(
        lines([{"file_name": f"{index}.png", "text": f"text {index % 3}"} for index in range(6)])
    )
    dataset = build_text_dataset(section(folder), Text(features=str(features)), small)
    assert found(dataset) == {index: f"text {index % 3}" for index in range(6)}


def test_codes_on_disk_serve_images_with_captions(pictures, section, tmp_path):
    """`grpo encode` reads such a folder, and the codes are the images' whatever their captions."""
    from grpo.jobs.encode import encode
    from grpo.parallel import distributed

    folder = pictures()
    beside(folder)
    sections = {
        "data": section(folder, num_workers=0).model_dump(),
        "tokenizer": {"name": "VQ-tiny", "codebook_size": 32, "downsample_size": 4, "checkpoint": vq(tmp_path)},
        "encode": {"output": str(tmp_path / "codes")},
    }
    with distributed(60) as world:
        encode(EncodeRecipe.model_validate(sections), world)
    (folder / "0.txt").write_text("another text")
    dataset = build_text_dataset(section(folder, codes=str(tmp_path / "codes")), WORDS, MODEL)
    from grpo.data import build_codes

    codes = build_codes(dataset, None, length=16, augmented=False, images=False)
    stream = build_stream(dataset, batch_size=6, seed=0, num_workers=0, world=ALONE)
    batch = next(stream)
    assert codes(batch).shape == (6, 16)
    assert "another text" in batch.captions


def vq(folder):
    from grpo.models import TOKENIZER_SPECS, VQModel, save_weights

    torch.manual_seed(0)
    model = VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=32))
    save_weights(folder / "vq.safetensors", model.state_dict(), config=model.config)
    return str(folder / "vq.safetensors")


@pytest.mark.parametrize("name", ["synthetic", "digits"])
def test_built_in_images_have_captions(name):
    dataset = build_text_dataset(Data(name=name, image_size=32), WORDS, MODEL)
    texts = dataset.captions_of.distinct()
    assert len(texts) == 10 if name == "digits" else len(texts) > 40
    assert len(dataset.captions_of) == len(dataset)
    assert isinstance(dataset.open(0), Image.Image)
    assert open_captions(Data(name=name, image_size=32)).requests is None
