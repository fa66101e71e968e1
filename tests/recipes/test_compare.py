"""Results and runs side by side."""

import json

import pytest

from grpo.config import UserError
from grpo.jobs import compare

RESULT = {
    "metrics": {"inception": {"fid": 3.5, "inception_score": None}},
    "images": {
        "source": {"model": {"path": "a.pt", "sha256": "aa"}},
        "sampler": {"cfg_scale": 1.0, "seed": 0, "batch_size": 4},
        "count": 12,
        "class_counts": [3, 3, 2, 2, 2],
    },
    "reference": {"source": {"path": "x/reference.npz", "sha256": "rr"}, "count": 9},
    "judges": {"inception": {"path": "inception.pth", "sha256": "ii"}},
    "settings": {"nearest_k": 3},
    "protocol": {"name": "none", "departures": []},
    "date": "2026-11-26",
}


@pytest.fixture
def results(tmp_path):
    """Two files; what a test changes of the second is given by dotted names."""

    def write(**changes):
        files = []
        for name, changed in (("a", {}), ("b", changes)):
            result = json.loads(json.dumps(RESULT))
            for key, value in changed.items():
                *sections, last = key.split("__")
                place = result
                for section in sections:
                    place = place[section]
                place[last] = value
            files.append(tmp_path / f"{name}.json")
            files[-1].write_text(json.dumps(result))
        return [str(file) for file in files]

    return write


def test_results_that_were_measured_alike(results, capsys):
    """Another model, place, batch and day are no other measurement."""
    files = results(
        metrics={"inception": {"fid": 3.25, "inception_score": 80.0}},
        images__source={"model": {"path": "b.pt", "sha256": "bb"}},
        images__sampler__batch_size=8,
        reference__source__path="y/reference.npz",
        date="2026-11-27",
    )
    compare.main(files)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "fid" in line).split() == ["fid", "3.5", "3.25", "(-0.25)"]
    assert next(line for line in lines if "inception_score" in line).split() == ["inception_score", "-", "80"]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("images__sampler__cfg_scale", 1.5, "images.sampler.cfg_scale: 1.0, 1.5"),
        ("images__sampler", {}, "images.sampler.seed: 0, -"),
        ("images__class_counts", [12, 0, 0, 0, 0], "class_counts: 2..3 of each of 5, 0..12 of each of 5"),
        ("reference__source__sha256", "zz", "reference.source.sha256: rr, zz"),
        ("judges__inception__sha256", "zz", "judges.inception.sha256: ii, zz"),
        ("settings__nearest_k", 5, "settings.nearest_k: 3, 5"),
    ],
)
def test_unequal_settings_are_refused_unless_allowed(results, capsys, key, value, told):
    files = results(**{key: value})
    with pytest.raises(UserError) as caught:
        compare.main(files)
    assert told in "\n".join(caught.value.problems)
    compare.main([*files, "--allow", key.replace("__", ".")])
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least two"),
        (["a.json"], "at least two"),
        (["a.json", "b.json", "--alow", "x"], "--alow: unknown flag"),
        (["a.json", "no.json"], "no.json"),
        (["a.json", "text.json"], "text.json is not a result file"),
        (["a.json", "list.json"], "list.json is not a result file"),
        (["a.json", "words.json"], "a metric is no number"),
    ],
)
def test_mistakes_are_told_in_one_line(results, tmp_path, monkeypatch, arguments, message):
    results()
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "words.json").write_text(json.dumps(RESULT | {"metrics": {"inception": {"fid": "low"}}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        compare.main(arguments)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.fixture
def folders(tmp_path, results):
    """Two folders of runs with a result file each."""

    def make(**changes):
        made = []
        for number, file in enumerate(results(**changes)):
            folder = tmp_path / f"run-{number}"
            folder.mkdir()
            lines = [json.dumps({"step": step, "reward_mean": step + number}) for step in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            (folder / "recipe.toml").write_text(f"[training]\nsteps = {3 + number}\n")
            (folder / "result.json").write_text((tmp_path / file).read_text())
            (folder / "other.json").write_text("[]")
            made.append(str(folder))
        return made

    return make


def test_runs_on_the_terminal_and_on_a_page(folders, tmp_path, capsys):
    better = {"inception": {"fid": 3.25, "inception_score": 80.0}}
    compare.main([*folders(metrics=better), "--html", str(tmp_path / "page.html")])
    told = capsys.readouterr().out
    for words in ("training.steps", "Reward", "result.json", "3.25 (-0.25)"):
        assert words in told, words
    text = (tmp_path / "page.html").read_text()
    assert "inception fid" in text
    assert "run-0" in text


def test_results_in_runs_that_were_not_measured_alike(folders, capsys):
    compare.main(folders(settings__nearest_k=5))
    told = " ".join(capsys.readouterr().out.split())
    assert "Not measured alike: settings.nearest_k: 3, 5" in told
    assert "3.25" not in told


def test_runs_and_results_do_not_mix(folders, results, tmp_path):
    with pytest.raises(UserError, match=r"gone: there is no such folder or file"):
        compare.main([str(tmp_path / "gone"), str(tmp_path)])
    with pytest.raises(UserError, match=r"a.json is not the folder of a run"):
        compare.main([folders()[0], results()[0]])


def test_names_from_anyone_do_not_steer_the_terminal(results, tmp_path, capsys):
    files = results(metrics={"\x1b[31mred": {"\x1b[2Jfid\ud800": 1.0}})
    compare.main([files[1], files[1]])
    for name in ("one", "\x1b[31mtwo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        (tmp_path / name / "recipe.toml").write_text(f'[model]\n"\\u001b[32m" = "\\u202e{name[-3:]}"\n')
    compare.main([str(tmp_path / "one"), str(tmp_path / "\x1b[31mtwo")])
    told = capsys.readouterr().out
    assert "\\x1b[31mred" in told
    assert all(letter not in told for letter in "\x1b\u202e\ud800")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "NaN"])
def test_numbers_that_are_none(results, tmp_path, capsys, number):
    files = results()
    text = json.dumps(RESULT).replace("3.5", number)
    (tmp_path / "b.json").write_text(text)
    if number.isdigit():
        with pytest.raises(UserError, match="too large"):
            compare.main(files)
        return
    compare.main(files)
    assert next(line for line in capsys.readouterr().out.splitlines() if "fid" in line).split() == ["fid", "3.5", "-"]
