"""recipes/train_classifier.py on digits."""

import pytest
import torch

from grpo.config import Data, UserError
from grpo.data import build_dataset
from grpo.jobs.train_classifier import shifted
from grpo.models import load_classifier

TINY = [
    "--data.name", "digits", "--data.split", "train_a", "--data.image_size", "32", "--data.num_workers", "0",
    "--classifier.width", "8", "--optimizer.lr", "5e-3",
]  # fmt: skip


def test_it_learns_digits_that_it_has_not_seen(run_here, tmp_path):
    flags = ["--training.steps", 60, "--training.batch_size", 32, "--optimizer.schedule", "one_cycle"]
    lines = run_here("classifier", *TINY, *flags, "--metrics.run_dir", tmp_path / "run")
    assert lines[0]["accuracy"] < 0.4
    classifier = load_classifier(tmp_path / "run" / "model.safetensors")
    digits = build_dataset(Data(name="digits", split="validation", image_size=32), num_classes=10)
    images, class_ids = zip(*(digits[i] for i in range(200)), strict=True)
    correct = classifier(torch.stack(images)).argmax(dim=1) == torch.tensor(class_ids)
    assert correct.float().mean() > 0.6


def test_two_processes_and_accumulation_take_the_steps_of_one(run_here, run_on_two, tmp_path):
    flags = [*TINY, "--training.steps", 3, "--training.mixed_precision", "fp32", "--checkpoint.save_final", "false"]
    one = run_here("classifier", *flags, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "one")
    parts = ["--training.batch_size", 8, "--training.micro_batch_size", 2]
    two = run_on_two("classifier", *flags, *parts, "--metrics.run_dir", tmp_path / "two")
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "accuracy", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name


def test_width_that_does_not_fit_is_refused(run_here, tmp_path):
    flags = [*TINY, "--metrics.run_dir", tmp_path / "run"]
    flags[flags.index("--classifier.width") + 1] = "12"
    with pytest.raises(UserError, match=r"classifier.width: width 12 must be a multiple of 8"):
        run_here("classifier", *flags)


def test_label_beyond_the_classes_is_refused(run_here, tmp_path):
    with pytest.raises(UserError, match=r"label 4 .* outside 0..3"):
        run_here("classifier", *TINY, "--classifier.num_classes", 4, "--metrics.run_dir", tmp_path / "run")


def test_classes_without_images_are_told(run_here, tmp_path):
    flags = [*TINY, "--training.steps", 1, "--training.batch_size", 8, "--metrics.run_dir", tmp_path / "run"]
    run_here("classifier", *flags, "--classifier.num_classes", 12)
    told = "images of 10 of num_classes = 12 classes, 2 are never learned; set num_classes = 10 if these are all"
    assert told in (tmp_path / "run" / "log.txt").read_text()
    digits = Data(name="digits", split="train_a", image_size=32)
    assert not build_dataset(digits, num_classes=10).remarks
    assert not build_dataset(digits, num_classes=12, learned=tuple(map(str, range(12)))).remarks


def test_shift_moves_images_without_tearing_them():
    columns = torch.arange(6.0).expand(1, 3, 6, 6)
    torch.manual_seed(0)
    seen = {tuple(shifted(columns, 1)[0, 0, 0].tolist()) for _ in range(40)}
    assert seen == {(0, 0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 5)}
    assert shifted(columns, 0) is columns
