"""Recipe files that are no recipes, in every way that a file can be wrong: one line that names the file."""

import os

import pytest

from grpo.config import EvaluateRecipe, GRPORecipe, UserError, load_recipe
from grpo.config.user_files import reading, reason, writing

TEXTS = {
    "nested lists": "x = " + "[" * 100_000,
    "nested tables": "x = " + "{a=" * 5000,
    "dotted names": ".".join("a" * 50_000) + " = 1",
    "a dotted name in a section": "[data]\n" + ".".join("a" * 5000) + " = 1",
    "a deep value of a key": "[data]\nname = " + "[" * 200 + "]" * 200,
    "a huge number": "x = " + "9" * 100_000,
    "huge": "# " + "x" * 2**21,
    "no text": "\0",
    "keys without end": "[data]\n" + "".join(f"key{number} = 1\n" for number in range(20_000)),
    "rewards without end": "".join(f"[reward.a{number}]\n" for number in range(10_000)),
    "a long name": "[data]\n" + "a" * 900_000 + " = 1",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_that_is_no_recipe(text, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.toml") as caught:
        load_recipe(GRPORecipe, ["--config", str(file)])
    assert all("\n" not in line and len(line) < 2100 for line in caught.value.problems)


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 10_000, "a\0b", "\x1b[31mred", ".", "/dev/zero", "missing.toml", "~"]
)
def test_paths_that_are_no_file(name):
    with pytest.raises(UserError, match="--config") as caught:
        load_recipe(GRPORecipe, ["--config", name])
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "recipe.toml").touch(mode=0)
    with pytest.raises(UserError, match="Permission denied"):
        load_recipe(GRPORecipe, ["--config", str(tmp_path / "recipe.toml")])


def test_every_error_of_reading_and_writing_is_one_line():
    errors = (
        MemoryError(), RecursionError("deep"), OSError(28, "No space left on device"), KeyError("name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ValueError("two\nlines\x1b[2J"), EOFError(),
        NotImplementedError("x" * 1000),
    )  # fmt: skip
    for boundary, prefix in ((lambda: reading("a.bin cannot be read"), "a.bin cannot be read: "),
                             (lambda: writing("a.bin"), "a.bin cannot be written: ")):  # fmt: skip
        for error in errors:
            with pytest.raises(UserError) as caught, boundary():
                raise error
            line = str(caught.value)
            assert line.startswith(prefix)
            assert line.isprintable()
            assert len(line) < 500
    assert reason(OSError(28, "No space left on device")) == "No space left on device"


def test_interrupts_pass_through():
    with pytest.raises(KeyboardInterrupt), reading("a"):
        raise KeyboardInterrupt


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_results_are_not_written_over_what_is_read(in_folder):
    for name in ("classifier.safetensors", "images.npz"):
        (in_folder / name).touch()
    os.link(in_folder / "classifier.safetensors", in_folder / "hard.json")
    (in_folder / "soft.json").symlink_to("images.npz")
    flags = ["--evaluation.images", "images.npz", "--evaluation.reference", "images.npz",
             "--evaluation.feature_checkpoint", "classifier.safetensors", "--evaluation.json_path"]  # fmt: skip
    for path, key in {"./classifier.safetensors": "feature_checkpoint", "hard.json": "feature_checkpoint",
                      "soft.json": "images"}.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"written over what evaluation\.{key} names"):
            load_recipe(EvaluateRecipe, [*flags, path], needs_files=True)
    load_recipe(EvaluateRecipe, [*flags, "result.json"], needs_files=True)


def test_results_are_not_written_over_the_recipe(in_folder):
    for name in ("images.npz", "classifier.safetensors"):
        (in_folder / name).touch()
    (in_folder / "mine.json").write_text('job = "evaluate"\n')
    flags = ["--evaluation.images", "images.npz", "--evaluation.reference", "images.npz", "--config", "mine.json",
             "--evaluation.feature_checkpoint", "classifier.safetensors"]  # fmt: skip
    with pytest.raises(UserError, match=r"mine\.json would be written over what --config names"):
        load_recipe(EvaluateRecipe, [*flags, "--evaluation.json_path", "mine.json"], needs_files=True)


def test_a_run_does_not_export_over_its_start(in_folder):
    (in_folder / "run").mkdir()
    (in_folder / "run" / "model.safetensors").touch()
    flags = ["--data.name", "synthetic", "--metrics.run_dir", "run", "--model.checkpoint", "run/model.safetensors"]
    with pytest.raises(UserError, match=r"run/model\.safetensors would be written over what model\.checkpoint names"):
        load_recipe(GRPORecipe, flags, needs_files=True)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--optimizer.lr", "1e308"), ("--optimizer.eps", "1e-320"), ("--model.dropout", "1"),
        ("--rollout.temperature", "1e-40"), ("--rollout.temperature", "1e300"), ("--objective.kl_coef", "1e308"),
        ("--reward.reconstruction.weight", "-1e308"), ("--model.num_classes", "2147483647"),
        ("--tokenizer.codebook_size", "2147483647"), ("--data.image_size", "2147483647"),
        ("--data.num_workers", "2147483647"), ("--rollout.cfg_scale", "1e300"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_work(flag, value):
    with pytest.raises(UserError, match=flag) as caught:
        load_recipe(GRPORecipe, ["--data.name", "synthetic", flag, value])
    assert "must be" in str(caught.value)


def test_kid_of_single_images():
    with pytest.raises(UserError, match=r"kid_subset_size must be a whole number >= 2"):
        load_recipe(EvaluateRecipe, ["--evaluation.kid_subset_size", "1"])


@pytest.mark.parametrize("key", ["metrics.run_dir", "checkpoint.dir", "checkpoint.resume", "data.path"])
def test_paths_with_nul_are_refused_before_anything_is_loaded(key, tmp_path):
    section, _, name = key.partition(".")
    (tmp_path / "recipe.toml").write_text(f'[{section}]\n{name} = "a\\u0000b"\n')
    with pytest.raises(UserError, match=f"{key} must be text without NUL"):
        load_recipe(GRPORecipe, ["--config", str(tmp_path / "recipe.toml")])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_rewards_file_that_has_no_end(make, tmp_path):
    make(tmp_path / "reward.py")
    flags = ["--reward.mine.kind", "python", "--reward.mine.function", f"{tmp_path}/reward.py:f"]
    with pytest.raises(UserError, match="pipe or a device"):
        load_recipe(GRPORecipe, ["--data.name", "synthetic", *flags])
