"""Opening data sets, and what is said when they cannot be opened."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from grpo.config import UserError
from grpo.data import build_dataset
from grpo.data.images import center_crop, to_pixels
from grpo.models import imagenet_names


def error_of(data, num_classes=4) -> str:
    with pytest.raises(UserError) as caught:
        build_dataset(data, num_classes=num_classes)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def assert_holds(dataset, images, class_ids):
    assert len(dataset) == len(images)
    assert dataset.class_ids.tolist() == class_ids
    for i, image in enumerate(images):
        assert torch.equal(dataset.pixels(i), to_pixels(center_crop(image, 16)))
        assert dataset[i][1] == class_ids[i]


@pytest.mark.parametrize("name", ["imagenet", "huggingface"])
@pytest.mark.parametrize("split", ["train", None])
def test_saved_dataset_with_image_and_class_names(saved_dataset, make_images, section, name, split):
    images = make_images(3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    path = saved_dataset({"image": images, "label": [1, 0, 1]}, split=split, features=features)
    dataset = build_dataset(section(path, name=name), num_classes=4)
    assert_holds(dataset, images, [1, 0, 1])
    assert dataset.class_names == ["cat", "dog", "2", "3"]
    assert dataset.captions(dataset.condition([0, 1])) == ["dog", "cat"]


@pytest.mark.parametrize("column", ["image", "image_path", "file", "filepath"])
@pytest.mark.parametrize("relative", [True, False])
def test_path_columns_and_the_second_name_of_labels(saved_dataset, make_images, section, tmp_path, column, relative):
    images = make_images(2)
    folder = tmp_path / "saved"
    names = ["pictures/0.png", "pictures/1.png"]
    (folder / "pictures").mkdir(parents=True)
    for name, image in zip(names, images, strict=True):
        image.save(folder / name)
    path = saved_dataset({column: names if relative else [str(folder / name) for name in names], "labels": [3, 0]})
    dataset = build_dataset(section(path), num_classes=4)
    assert_holds(dataset, images, [3, 0])
    assert dataset.class_names == ["0", "1", "2", "3"]
    assert "pictures/1.png" in dataset.describe(1)


def test_image_wins_over_path_columns(saved_dataset, make_images, section):
    images = make_images(1)
    path = saved_dataset(
        {"file": ["missing.png"], "image": [{"bytes": encoded(images[0]), "path": None}], "label": [0]}
    )
    assert_holds(build_dataset(section(path), num_classes=1), images, [0])


def test_encoded_bytes_as_a_column(saved_dataset, make_images, section):
    images = make_images(2)
    path = saved_dataset({"image": [encoded(image) for image in images], "label": [0, 1]})
    assert_holds(build_dataset(section(path), num_classes=2), images, [0, 1])


@pytest.mark.parametrize("inside", ["", "train"])
@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_folder_of_class_folders(class_folders, make_images, section, inside, name):
    path = class_folders(["zebra", "ant"], 2, inside=inside)
    (path / inside / ".cache").mkdir()
    (path / inside / "ant" / "notes.txt").write_text("no image")
    images = make_images(4)
    dataset = build_dataset(section(path, name=name), num_classes=2)
    assert_holds(dataset, [images[2], images[3], images[0], images[1]], [0, 0, 1, 1])
    assert dataset.class_names == ["ant", "zebra"]
    assert dataset.describe(3).endswith("zebra/001.png")


def test_synthetic_images_depend_on_index_and_split_only(section):
    first, again, other = (
        build_dataset(section(name="synthetic", split=split), num_classes=4) for split in ("train", "train", "test")
    )
    assert torch.equal(first[9][0], again[9][0])
    assert not torch.equal(first[9][0], first[13][0])
    assert not torch.equal(first[9][0], other[9][0])
    assert first[9][1] == 1
    assert len(build_dataset(section(name="synthetic"), num_classes=3000)) == 3000


def test_missing_path(section, tmp_path):
    (tmp_path / "file").touch()
    assert "data.path is missing" in error_of(section())
    assert "does not exist" in error_of(section(tmp_path / "nowhere"))
    assert "is not a folder" in error_of(section(tmp_path / "file"))


def test_folder_that_is_no_data_set(section, tmp_path):
    assert "has no folders" in error_of(section(tmp_path))
    (tmp_path / "cat").mkdir()
    assert "no images in them" in error_of(section(tmp_path))
    assert "set data.name to folder" in error_of(section(tmp_path, name="huggingface"))
    assert "no folder 'validation'" in error_of(section(tmp_path, split="validation"))


def test_saved_dataset_is_no_folder(saved_dataset, section):
    path = saved_dataset({"image": ["x"], "label": [0]})
    assert "set data.name to huggingface" in error_of(section(path, name="folder"))


def test_damaged_saved_dataset(saved_dataset, section):
    path = saved_dataset({"image": ["x"], "label": [0]})
    next((path / "train").glob("*.arrow")).write_bytes(b"not arrow")
    assert "cannot be read as a saved Hugging Face dataset" in error_of(section(path))
    (path / "dataset_dict.json").write_text("{")
    assert "cannot be read as a saved Hugging Face dataset" in error_of(section(path))


def test_unknown_split_lists_those_present(saved_dataset, section):
    path = saved_dataset({"image": ["x"], "label": [0]}, split="validation")
    assert "['validation']" in error_of(section(path))


def test_split_of_a_dataset_without_splits(saved_dataset, section):
    path = saved_dataset({"image": ["x"], "label": [0]}, split=None)
    assert "without splits" in error_of(section(path, split="validation"))


def test_missing_columns_name_those_present(saved_dataset, section):
    message = error_of(section(saved_dataset({"picture": ["x"], "label": [0]})))
    assert "['picture', 'label']" in message
    assert "'image' or 'image_path' or 'file' or 'filepath'" in message


def test_missing_labels(saved_dataset, section):
    assert "'label' or 'labels'" in error_of(section(saved_dataset({"image": ["x"]})))


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["a"], "holds string: labels must be integers"), ([0.5], "holds double"), ([None, 1], "row 0 .*has no 'label'")],
)
def test_labels_that_are_no_integers(saved_dataset, section, labels, words):
    path = saved_dataset({"image": ["x"] * len(labels), "label": labels})
    with pytest.raises(UserError, match=words):
        build_dataset(section(path), num_classes=2)


def test_image_column_of_another_type(saved_dataset, section):
    message = error_of(section(saved_dataset({"image": [np.zeros((2, 2)).tolist()], "label": [0]})))
    assert "must hold images, paths, or encoded bytes" in message


@pytest.mark.parametrize("num_classes", [None, 1000])
def test_label_that_no_data_set_has(saved_dataset, section, num_classes):
    message = error_of(section(saved_dataset({"image": ["x", "y"], "label": [0, 2**40]})), num_classes=num_classes)
    assert "image 1 (y) of split 'train' of" in message
    assert "has label 1099511627776" in message


@pytest.mark.parametrize("label", [4, -1])
def test_label_out_of_range_in_a_saved_dataset(saved_dataset, section, label):
    message = error_of(section(saved_dataset({"image": ["x", "y.png", "z"], "label": [0, label, label]})))
    assert "image 1 (y.png)" in message
    assert f"label {label} (and 1 more), outside 0..3" in message
    assert "num_classes (now 4)" in message


def test_labels_may_not_matter(saved_dataset, section):
    path = saved_dataset({"image": ["x", "y"], "label": [-1, 2]})
    assert build_dataset(section(path), num_classes=None).class_names == ["0", "1", "2"]


def test_more_folders_than_classes(class_folders, section):
    message = error_of(section(class_folders(["a", "b", "c"], 1)), num_classes=2)
    assert "c/000.png has label 2, outside 0..1" in message


@pytest.mark.parametrize(("shards", "words"), [(None, "split without images"), ({"train": 1}, "no images in split")])
def test_empty_data_set(saved_dataset, section, shards, words):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    path = saved_dataset({"image": [], "label": []}, features=features, shards=shards)
    assert words in error_of(section(path))


def test_folders_are_compared_with_the_models_classes(class_folders, section):
    path = class_folders(["n01443537", "tench"], 2)
    dataset = build_dataset(section(path), num_classes=1000, learned=imagenet_names())
    assert dataset.class_ids.tolist() == [1, 1, 0, 0]
    assert dataset.class_names == list(imagenet_names())
    assert dataset.captions(dataset.condition([0])) == ["goldfish"]


def test_a_folder_that_is_no_class_of_the_model(class_folders, section):
    path = class_folders(["cat", "tench"], 1)
    with pytest.raises(UserError, match=rf"data\.path {path}: 'cat' is no class of the model"):
        build_dataset(section(path), num_classes=1000, learned=imagenet_names())


def test_wordnet_ids_have_imagenets_names_from_scratch(class_folders, section):
    dataset = build_dataset(section(class_folders(["n01443537"], 2)), num_classes=1000)
    assert dataset.class_ids.tolist() == [1, 1]
    assert dataset.class_names[:2] == ["tench", "goldfish"]


def test_new_classes_are_named_after_the_data(class_folders, section):
    path = class_folders(["ant", "my dog"], 1)
    dataset = build_dataset(section(path), num_classes=3, learned=("cat", "ant"))
    assert dataset.class_ids.tolist() == [1, 2]
    assert dataset.class_names == ["cat", "ant", "my dog"]
    with pytest.raises(UserError, match=r"1 new class \(of the model's classes they have 'ant'\)"):
        build_dataset(section(path), num_classes=4, learned=("cat", "ant"), new_classes=2)


@pytest.mark.parametrize(("folders", "count"), [(("ant", "bee", "cow"), 3), (("ant", "bee"), 3)])
def test_a_new_class_without_images_is_refused(class_folders, section, folders, count):
    """An empty folder, or a number of classes that is too large, where the model keeps none of its own classes."""
    path = class_folders(["ant", "bee"], 1)
    for name in folders:
        (path / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"2 new classes.* model\.new_classes = 3: add images") as caught:
        build_dataset(section(path), num_classes=count, new_classes=count)
    assert ("none of 'cow'" in str(caught.value)) == ("cow" in folders)
    assert build_dataset(section(path), num_classes=count).class_names[:2] == ["ant", "bee"]  # from scratch it may be


def test_a_new_class_is_called_what_the_map_says(class_folders, section, tmp_path):
    (tmp_path / "map.txt").write_text("ant 1\nbee wasp\n")
    mapped = section(class_folders(["ant", "bee"], 1), class_map=str(tmp_path / "map.txt"))
    dataset = build_dataset(mapped, num_classes=2)
    assert dataset.class_ids.tolist() == [1, 0]
    assert dataset.class_names == ["wasp", "ant"]


def test_names_of_a_class_label_are_compared(saved_dataset, section):
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    path = saved_dataset({"image": ["x", "y", "z"], "label": [1, 0, 1]}, features=features)
    dataset = build_dataset(section(path), num_classes=3, learned=("b", "c", "a"))
    assert dataset.class_ids.tolist() == [0, 2, 0]
    with pytest.raises(UserError, match="'a' is no class of the model"):
        build_dataset(section(path), num_classes=3, learned=("b", "c", "d"))
    unlabelled = saved_dataset({"image": ["x", "y"], "label": [0, -1]}, features=features)
    assert "image 1 (y) of split 'train'" in error_of(section(unlabelled))


def test_unnamed_integers_are_ids_unless_they_are_mapped(saved_dataset, section, tmp_path):
    path = saved_dataset({"image": ["x", "y"], "label": [3, 0]})
    plain = build_dataset(section(path), num_classes=1000, learned=imagenet_names())
    assert plain.class_ids.tolist() == [3, 0]
    assert plain.class_names[3] == "tiger shark"
    (tmp_path / "map.txt").write_text("0 goldfish\n3 7\n")
    mapped = section(path, class_map=str(tmp_path / "map.txt"))
    assert build_dataset(mapped, num_classes=1000, learned=imagenet_names()).class_ids.tolist() == [7, 1]


def test_classes_without_images(section):
    dataset = build_dataset(section(name="classes"), num_classes=3, learned=("a", "b", "c"))
    assert dataset.class_ids.tolist() == [0, 1, 2]
    assert dataset.class_names == ["a", "b", "c"]
    assert dataset.pixels(1).shape == (3, 0, 0)
    chosen = section(name="classes", classes=["goldfish", "7", "n01440764"])
    dataset = build_dataset(chosen, num_classes=1000, learned=imagenet_names())
    assert dataset.class_ids.tolist() == [1, 7, 0]
    assert build_dataset(section(name="classes", classes=["2"]), num_classes=3).class_ids.tolist() == [2]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["3"], "'3' is no class of the model: give ids in 0..2, or names"),
        (["bird"], "'bird' is no class of the model"),
        ([], "is empty"),
    ],
)
def test_a_class_that_the_model_does_not_have(section, classes, words):
    message = error_of(section(name="classes", classes=classes), num_classes=3)
    assert words in message
    assert message.startswith("data.classes")
