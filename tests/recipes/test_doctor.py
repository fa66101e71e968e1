"""`grpo doctor` says what is there, and ends with code 2 only where nothing can be trained."""

import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from grpo.config import UserError
from grpo.jobs import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    doctor.main(["--dir", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("note    gpu") and "runs use the CPU" in line for line in lines)
    assert any(line.startswith("ok      disk") and str(tmp_path) in line for line in lines)
    assert lines[-1].startswith("Ready to train on this CPU")
    assert not list(tmp_path.iterdir()), "what was written was removed"


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="cannot train here until this is mended: disk"):
        doctor.main(["--dir", "/proc/self/runs"])
    assert "broken  disk" in capsys.readouterr().out


def test_packages_are_compared_with_what_the_distribution_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"": ["torch>=2.11", "no-such-package"], "rewards": ["numpy<1"]}
    monkeypatch.setattr(doctor, "_requirements", lambda extra: [Requirement(text) for text in wanted.get(extra, [])])
    broken = [finding.what for finding in doctor.packages() if finding.state == "broken"]
    assert broken == ["no-such-package is missing"]
    states = {finding.part: finding for finding in doctor.extras()}
    assert states["rewards"].state == "note"
    assert "pip install 'autoregressive-grpo[rewards]'" in states["rewards"].what
    assert states["evaluation"].state == "ok"


def test_the_requirements_of_an_extra_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["torch>=2.11", "triton; platform_system == 'Linux'", "timm>=1; extra == 'rewards'", "x; extra == 's3'"]
    monkeypatch.setattr(doctor, "requires", lambda _: texts)
    assert [item.name for item in doctor._requirements(extra="")] == ["torch", "triton"]
    assert [item.name for item in doctor._requirements("rewards")] == ["timm"]


def test_what_is_no_flag_is_refused() -> None:
    with pytest.raises(UserError, match="--folder: unknown flag"):
        doctor.main(["--folder", "x"])


def test_a_file_is_no_folder_for_runs(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/runs"):
        [finding] = doctor.folder(tmp_path / place)
        assert (finding.state, "is no folder" in finding.what) == ("broken", True)
    [finding] = doctor.folder(tmp_path / ("a" * 5000))
    assert finding.part == "disk"


def test_every_extra_for_users_is_told() -> None:
    declared = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
    assert {*doctor.EXTRAS} == declared - {"dev", "docs", "launch", "benchmarks"}
