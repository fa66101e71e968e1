"""A run_state.json that a stranger has made: refused before anything is taken over, with all metrics kept."""

import json
import shutil

import pytest

from grpo.config import UserError
from grpo.formats import file_sums, manifest_text, read_manifest
from tests.training.test_resume import run

STEPS = ("--training.steps", 2, "--checkpoint.interval", 2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    run(folder, *STEPS)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"step": 2.5}, {"step": True}, {"step": 10**400}, {"stream": {"samples": 2**70}},
        {"stream": {"samples": "3"}}, {"optimizer_step": {"steps": 2}}, {"extra": None}, {"extra": {"entropy": 5}},
        {"extra": {"entropy": {"weight": [0.0]}}},
        *({"optimizer_step": {"steps": 2, "skipped": 0, "skipped_in_a_row": 0, "scaler": None} | part}
          for part in ({"steps": "2"}, {"steps": 10**400}, {"skipped": None}, {"skipped_in_a_row": {"a": 1}})),
    ],
    ids=str,
)  # fmt: skip
def test_other_things_where_numbers_are_expected(two_steps, tmp_path, change):
    shutil.copytree(two_steps, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    file = folder / "run_state.json"
    state = json.loads(file.read_text())
    state["run"] |= change
    file.write_text(json.dumps(state))
    (folder / "manifest.json").write_text(manifest_text({**read_manifest(folder), **file_sums([file])}))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"run_state\.json is not that of a training run"):
        run(tmp_path / "run", "--training.steps", 3, "--checkpoint.interval", 2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
