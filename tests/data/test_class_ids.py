"""Every row of the table in `grpo.data.class_ids`: which ids names get, and where they are refused."""

import json

import numpy as np
import pytest

from grpo.config import UserError
from grpo.data.class_ids import find_class_ids, implied_classes
from grpo.data.class_map import read_class_map
from grpo.models import imagenet, imagenet_names, numbered

IMAGENET = imagenet_names()
PETS = ("cat", "dog", "fish")
WORDNET = list(imagenet())


@pytest.mark.parametrize(
    ("names", "num_classes", "learned", "class_ids"),
    [
        # all names of the model, in its order
        (WORDNET, 1000, IMAGENET, list(range(1000))),
        ([", ".join(names) for names in imagenet().values()], 1000, IMAGENET, list(range(1000))),
        (["Cat", "dog", "fish"], 3, PETS, [0, 1, 2]),
        # names of classes of the model
        (["dog", "fish"], 3, PETS, [1, 2]),
        (["FISH", "cat"], 3, PETS, [2, 0]),
        (["goldfish", "great_white-shark", "tench, Tinca tinca"], 1000, IMAGENET, [1, 2, 0]),
        (["10", "2", "9"], 12, numbered(12), [10, 2, 9]),
        # WordNet ids and other names of ImageNet
        (["n01443537", "n02391049"], 1000, IMAGENET, [1, 340]),
        (["Carassius auratus"], 1000, IMAGENET, [1]),
        (["harp", "missile"], 1000, IMAGENET, [594, 657]),  # usual names, that others have beside their own
        # numbers
        (["0", "1", "10"], 11, (), [0, 1, 10]),
        (["207", "007"], 1000, IMAGENET, [207, 7]),
        (["1", "2", "3"], 3, (), [0, 1, 2]),  # 3 is no id: names like others
        # as many names as classes without a name
        (["ant", "bee", "cow"], 3, numbered(3), [0, 1, 2]),
        # free ids
        (["ant", "zebra"], 4, (), [0, 1]),
        (["ant", "zebra"], 2, (), [0, 1]),
        (["ant", "zebra"], 1002, IMAGENET, [310, 340]),
        (["my cat", "my dog"], 1002, IMAGENET, [1000, 1001]),
        (["my cat", "tench", "my_dog"], 1003, IMAGENET, [1000, 0, 1001]),
        (["x", "dog"], 5, (*PETS, "3"), [4, 1]),
        (["ant", "bee"], 5, numbered(3), [3, 4]),
    ],
)
def test_ids_that_are_no_guess(names, num_classes, learned, class_ids):
    assert find_class_ids(names, num_classes=num_classes, learned=learned) == class_ids


@pytest.mark.parametrize(
    ("names", "num_classes", "learned", "words"),
    [
        (["cat", "dog", "fish"], 1000, IMAGENET, "'cat', 'dog', 'fish' are no classes of the model, which has 'tench'"),
        (["n01443537", "n00000001"], 1000, IMAGENET, "'n00000001' is not among ImageNet's 1000 classes"),
        ([f"class {i}" for i in range(1000)], 1000, IMAGENET, "and 996 more are no classes of the model"),
        (["dog", "bird"], 3, PETS, "'bird' is no class of the model, which has 'cat', 'dog', 'fish'"),
        (["ant", "bee"], 3, numbered(3), "cannot be compared with the model's 3 classes, whose names are not known"),
        (["1", "2", "3"], 3, numbered(3), "'3' cannot be compared"),
        (["my cat", "my dog"], 1001, IMAGENET, "model.new_classes leaves 1 id;"),
        (["crane"], 1000, IMAGENET, r"'crane' is a name of the classes 134 \(n02012849\) and 517 \(n03126707\)"),
        (["panda"], 1000, IMAGENET, r"classes 387 \(n02509815\) and 388 \(n02510455\)"),
        (["a-b"], 2, ("a b", "a_b"), r"classes 0 \(a b\) and 1 \(a_b\)"),
    ],
)
def test_ids_that_would_be_a_guess(names, num_classes, learned, words):
    with pytest.raises(UserError, match=words) as caught:
        find_class_ids(names, num_classes=num_classes, learned=learned, source="data.path x")
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith("data.path x: ")
    assert "data.class_map" in str(caught.value)


def test_an_id_that_the_map_gives_is_not_given_again():
    with pytest.raises(UserError, match="'foo' is no class of the model, which has 'tench'"):
        find_class_ids(["a", "b"], num_classes=1001, learned=IMAGENET, class_map={"a": "1000", "b": "foo"})
    with pytest.raises(UserError, match=r"'x', 'y' have no id left, 1 of num_classes are free"):
        find_class_ids(["a", "b", "c"], num_classes=2, class_map={"a": "0", "b": "x", "c": "y"})


def test_published_lists_of_imagenet_tell_namesakes_apart():
    names = [", ".join(names) for names in imagenet().values()]
    names[134], names[517], names[639] = "crane bird", "crane2", "maillot tank suit"
    assert find_class_ids(names, num_classes=1000, learned=IMAGENET) == list(range(1000))
    shuffled = np.random.default_rng(0).permutation(1000)
    with pytest.raises(UserError, match="is a name of the classes"):
        find_class_ids([names[i] for i in shuffled], num_classes=1000, learned=IMAGENET)


def test_one_unknown_name_among_many_is_refused():
    """999 of 1,000 are ImageNet's, 99 of 100 the model's own: what the last one is would be a guess."""
    with pytest.raises(UserError, match=r"'unicorn' is no class of the model.*\n.*'crane' is a name of the classes"):
        find_class_ids([*IMAGENET[:999], "unicorn"], num_classes=1000, learned=IMAGENET)
    own = [f"thing {chr(97 + number % 26)}{number}" for number in range(100)]
    with pytest.raises(UserError, match=r"'other' is no class of the model.*data\.class_map"):
        find_class_ids([*own[:40], "other", *own[41:]], num_classes=100, learned=own)


def test_two_names_of_one_class(caplog):
    with pytest.raises(UserError, match=r"'Cat' and 'cat' are both class 0 of the model: .* data.class_map"):
        find_class_ids(["Cat", "cat"], num_classes=3, learned=PETS)
    with pytest.raises(UserError, match="'7' and '07' are both class 7"):
        find_class_ids(["7", "07"], num_classes=8)
    assert not caplog.records
    for learned in ((), PETS):
        new = find_class_ids(["My-Cat", "my cat"], num_classes=5, learned=learned)
        assert new == [len(learned), len(learned) + 1]
        assert "'My-Cat' and 'my cat' are written differently: two classes" in caplog.text
        caplog.clear()


def test_accents_are_composed_or_not():
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert find_class_ids([apart, "tea"], num_classes=2, learned=("tea", composed)) == [1, 0]
    assert find_class_ids([apart], num_classes=2, learned=("tea", "x"), class_map={composed: "1"}) == [1]


def test_names_of_torchvision_and_timm():
    """Their lists are not ours; all that is compared is whether each name leads to its id."""
    timm_data = pytest.importorskip("timm.data")
    categories = pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES
    info = timm_data.ImageNetInfo()
    assert info.label_names() == WORDNET
    assert find_class_ids(categories, num_classes=1000, learned=IMAGENET) == list(range(1000))
    for class_id, name in enumerate(categories):
        if name.lower() not in ("crane", "cardigan", "maillot"):
            assert find_class_ids([name], num_classes=1000, learned=IMAGENET) == [class_id]


def test_wordnet_ids_define_themselves_where_all_ids_are_free():
    assert implied_classes(["n01443537"], num_classes=1000) == IMAGENET
    assert implied_classes(["n01443537"], num_classes=999) == ()
    assert implied_classes(["n01443537", "cat"], num_classes=1000) == ()
    assert implied_classes([], num_classes=1000) == ()


def test_names_without_images():
    """They are no reason to refuse, keep their place in a training from scratch, and take no new id."""
    assert find_class_ids(["a", "cat", "b"], num_classes=3, learned=PETS, used=[1]) == [-1, 0, -1]
    assert find_class_ids(["a", "b", "c"], num_classes=3, used=[1, 2]) == [0, 1, 2]
    assert find_class_ids(["a", "b", "dog"], num_classes=4, learned=PETS, used=[1, 2]) == [-1, 3, 1]


@pytest.mark.parametrize(
    ("mapping", "learned", "num_classes", "class_ids"),
    [
        ({"a": "2", "b": "0"}, PETS, 3, [2, 0]),
        ({"a": "dog", "b": "2"}, PETS, 3, [1, 2]),
        ({"a": "dog", "b": "dog"}, PETS, 3, [1, 1]),
        ({"a": "n01443537", "b": "tench"}, IMAGENET, 1000, [1, 0]),
        ({"a": "bird", "b": "cat"}, PETS, 4, [3, 0]),
        ({"a": "bird", "b": "bird"}, (), 2, [0, 0]),
        ({"a": "bird", "b": "Bird"}, (), 2, [0, 1]),
        ({"a": "0", "b": "bird"}, (), 2, [0, 1]),  # an id that the map says is not free any more
        ({"a": "3", "b": "bird"}, PETS, 5, [3, 4]),
        ({"a": "dog", "b": "1"}, PETS, 3, [1, 1]),
        ({"a": "1", "b": "0", "unused": "7"}, numbered(2), 2, [1, 0]),
    ],
)
def test_mapped_names(mapping, learned, num_classes, class_ids):
    keys = {"num_classes": num_classes, "learned": learned, "class_map": mapping}
    assert find_class_ids(["a", "b"], **keys) == class_ids


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"a": "1"}, "data.class_map has no line for 'b' of data.path x: add one"),
        ({"a": "1", "b": "3"}, r"maps 'b' to 3, outside 0\.\.2"),
        ({"a": "1", "b": "bird"}, "'bird' is no class of the model"),
        ({"a": "1", "b": "9" * 5000}, r"maps 'b' to 9{20}\.\.\., which is no class id"),
        ({"a": "-1", "b": "1.0"}, r"(?s)maps 'a' to -1, which is no class id.*maps 'b' to 1\.0, which is no class id"),
        ({"class": "id", "a": "1", "b": "1"}, r"begins with 'class', 'id': .* leave out the line \(a header\?\)"),
    ],
)
def test_mapping_that_does_not_fit(mapping, words):
    with pytest.raises(UserError, match=words):
        find_class_ids(["a", "b"], num_classes=3, learned=PETS, class_map=mapping, source="data.path x")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", json.dumps({"cat": 281, "big dog": "n02084071"})),
        ("map.toml", 'cat = 281\n"big dog" = "n02084071"\n'),
        ("map.txt", "# class, id\ncat\t281\n\nbig dog\tn02084071\n"),
        ("map.csv", "\ufeffcat,281\nbig dog, n02084071\n"),
        ("map.csv", '"cat","281"\n"big dog", "n02084071"\n'),
    ],
)
def test_layouts_of_a_mapping_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_map(str(tmp_path / name)) == {"cat": "281", "big dog": "n02084071"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("map.json", b"{", "cannot be read"),
        ("map.json", b"[1, 2]", "must be one table"),
        ("map.json", b'{"cat": [1]}', "must be one table"),
        ("map.json", b'{"cat": true}', "must be one table"),
        ("map.json", b'{"cat": 1, "cat": 2}', "has 'cat' twice"),
        ("map.json", b"[" * 100000, "cannot be read"),
        ("map.toml", b"cat = 1.5", "must be one table"),
        ("map.toml", b"cat", "cannot be read"),
        ("map.txt", b"cat 1\ncat 2", "has 'cat' twice"),
        ("map.txt", b"cat", "'cat' is not a class and its id or name"),
        ("map.txt", b"\xff\xfe", "cannot be read"),
        ("map.txt", "caf\u00e9 1\ncafe\u0301 2".encode(), "twice"),
        ("map.csv", b'"cat, 281', "cannot be read"),
        ("map.csv", b"cat,tench,281", "put what has commas in double quotes"),
    ],
)
def test_damaged_mapping_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_class_map(str(tmp_path / name))
    assert str(caught.value).startswith(f"data.class_map {tmp_path}")
    assert "\n" not in str(caught.value)


def test_missing_mapping_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt cannot be read: No such file"):
        read_class_map(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_class_map(str(tmp_path))


@pytest.mark.timeout(20)
def test_a_class_twice_in_a_long_class_map(tmp_path):
    lines = [f"class {number},0" for number in range(200_000)]
    (tmp_path / "map.csv").write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(UserError, match="has 'class 199999' twice"):
        read_class_map(str(tmp_path / "map.csv"))
