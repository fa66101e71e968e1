"""RunObserver: what is in a run's folder, who writes it."""

from itertools import pairwise

import pytest
import torch

from grpo.config import Metrics, UserError
from grpo.observe import RunObserver, SampleRow, read_metrics


def observer(run_dir, *, main=True, start_step=0, total_steps=4, **metrics):
    settings = Metrics(interval=2, image_interval=2, **metrics)
    return RunObserver(
        run_dir,
        settings,
        total_steps=total_steps,
        recipe_text="[training]\nsteps = 4\n",
        title="GRPO",
        main=main,
        start_step=start_step,
    )


def sample_rows():
    return [SampleRow(None, torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]), "seven")]


def run_steps(watching, steps):
    for step in steps:
        watching.log(step, {"loss": 0.5**step, "reward_mean": -1.0})
        if watching.wants_images(step):
            watching.images(step, sample_rows())


def test_grids_that_are_kept_are_spread_over_the_run(tmp_path):
    with observer(tmp_path, total_steps=200, keep_grids=8) as watching:
        run_steps(watching, range(1, 201))
    steps = [int(path.stem.removeprefix("step-")) for path in sorted((tmp_path / "samples").iterdir())]
    assert len(steps) == 8
    assert (steps[0], steps[-1]) == (1, 200)
    assert max(after - before for before, after in pairwise(steps)) <= 2 * 200 / 7


def test_a_run_leaves_its_folder(tmp_path):
    with observer(tmp_path / "run") as watching:
        run_steps(watching, range(1, 5))
        watching.message("a note")
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    samples = {f"samples/step-{step:06d}.png" for step in (1, 2, 4)}
    assert names == {"recipe.toml", "metrics.jsonl", "log.txt", "report.html", *samples}
    assert [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0.5, 0.25, 0.125, 0.0625]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "GRPO 2/4  reward -1  loss 0.25" in log
    assert "GRPO 1/4" not in log
    assert "a note" in log
    assert log.endswith("finished at step 4\n")
    assert "finished, step 4 of 4" in (tmp_path / "run" / "report.html").read_text()


def test_a_new_run_overwrites_nothing(tmp_path):
    for loss_lines in (4, 2, 1):
        with observer(tmp_path, total_steps=loss_lines) as watching:
            assert read_metrics(tmp_path / "metrics.jsonl") == []
            run_steps(watching, range(1, loss_lines + 1))
            (tmp_path / "model.safetensors").write_text(f"weights of {loss_lines}")
    for folder, loss_lines in (("previous/1", 4), ("previous/2", 2), ("", 1)):
        assert len(read_metrics(tmp_path / folder / "metrics.jsonl")) == loss_lines
        assert (tmp_path / folder / "model.safetensors").read_text() == f"weights of {loss_lines}"
        assert len(list((tmp_path / folder / "samples").iterdir())) == {4: 3, 2: 2, 1: 1}[loss_lines]


def test_a_recipe_of_the_users_in_the_runs_folder_is_kept(tmp_path):
    (tmp_path / "recipe.toml").write_text("# mine\n")
    for _ in range(2):  # the second start has nothing to move
        observer(tmp_path)
    assert [path.read_text() for path in tmp_path.glob("previous/*/recipe.toml")] == ["# mine\n"]


def test_garbage_in_the_metrics_and_names_from_anywhere_do_not_stop_a_run(tmp_path):
    with observer(tmp_path) as watching:
        run_steps(watching, range(1, 3))
    huge = "9" * 400
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(
            f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in ((f"-{huge}", 1), (1, huge), (1, "[]"))
        )
    with observer(tmp_path, start_step=2) as watching:
        run_steps(watching, range(3, 5))
        watching.message("step-000002 is damaged: \udcff\x1b[2J")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert r"is damaged: \udcff\x1b[2J" in (tmp_path / "log.txt").read_text()


def test_a_run_that_stops_says_why(tmp_path):
    def stopped():
        with observer(tmp_path) as watching:
            run_steps(watching, [1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / "log.txt").read_text().endswith("stopped by KeyboardInterrupt at step 1\n")
    assert "stopped by KeyboardInterrupt, step 1 of 4" in (tmp_path / "report.html").read_text()


def test_a_continued_run_goes_on_in_the_same_files(tmp_path):
    with observer(tmp_path) as watching:
        run_steps(watching, range(1, 4))
    with observer(tmp_path, start_step=2) as watching:
        run_steps(watching, range(3, 5))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "log.txt").read_text().count("GRPO: from step") == 2


def test_other_ranks_write_nothing(tmp_path):
    with observer(tmp_path / "run", main=False) as watching:
        run_steps(watching, range(1, 5))
        watching.message("a note")
    assert not (tmp_path / "run").exists()


def test_images_are_due_at_the_interval_and_at_both_ends(tmp_path):
    watching = observer(tmp_path, main=False, total_steps=7)
    assert [step for step in range(1, 8) if watching.wants_images(step)] == [1, 2, 4, 6, 7]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to the run's folder .*run: .*; set metrics.run_dir"):
        observer(tmp_path / "run")
