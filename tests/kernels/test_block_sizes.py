"""The table of block sizes and its tuner, with a clock of our own: a CPU has no kernel to time."""

import json
import os

import pytest
import torch

from grpo.kernels import block_sizes as table_of
from grpo.kernels import tune as tuner
from grpo.kernels.tune import Work, tune, works, write_table

TABLE = {"default": {"op": [{"up_to": 100, "TILE": 32}, {"TILE": 64}], "other": [{"TILE": 8}]}}
TIMES = {16: 3.0, 32: 2.0, 64: 1.0, 128: 0.5, 256: 0.1, 512: 0.01}


class Measured:
    """An op whose time depends on its tile, which is wrong with 256 and does not compile with 512."""

    def __init__(self, op="op"):
        self.op, self.tiles = op, []

    def prepare(self):
        return self.run

    def run(self):
        self.tiles.append(table_of.block_sizes(self.op, 50)["TILE"])
        if self.tiles[-1] == 512:
            raise RuntimeError("out of resource: shared memory")
        return [torch.ones(3) * (2 if self.tiles[-1] == 256 else 1)]

    def clock(self, run):
        run()
        return TIMES[self.tiles[-1]]

    def tuned(self, tiles, table=TABLE, above=0, up_to=None, **options):
        candidates = [{"TILE": tile} for tile in tiles]
        work = Work(self.op, 50, above, up_to, candidates, self.prepare)
        return tune([work], table, "GPU", clock=self.clock, **options)


def test_the_fastest_that_is_right_goes_into_the_table_under_the_gpu():
    tuned = Measured().tuned([16, 64, 512, 256, 128, 32], above=10, up_to=80)
    assert tuned == TABLE | {"GPU": {"op": [{"above": 10, "up_to": 80, "TILE": 128}]}}
    sizes = {size: table_of.find(tuned, "op", size, "GPU")["TILE"] for size in (10, 11, 80, 81, 101)}
    assert sizes == {10: 32, 11: 128, 80: 128, 81: 32, 101: 64}
    assert table_of.find(tuned, "op", 50, "another GPU") == {"TILE": 32}
    assert "GPU" not in TABLE  # what came in is as it was


def test_what_is_not_faster_changes_nothing_and_what_is_measured_again_is_replaced():
    assert Measured().tuned([16, 256]) == TABLE
    once = Measured().tuned([64])
    assert Measured().tuned([128], once)["GPU"]["op"] == [{"above": 0, "TILE": 128}]


def test_noise_is_no_reason(monkeypatch):
    monkeypatch.setitem(TIMES, 64, 1.99)
    assert Measured().tuned([64]) == TABLE


def test_every_op_is_written_and_read_again(tmp_path):
    file = tmp_path / "table.json"
    tuned = Measured().tuned([64, 128], written=lambda table: write_table(table, file))
    assert table_of.read_table(file) == tuned
    with table_of.trying("op", {"TILE": 1}):
        assert table_of.block_sizes("op", 50) == {"TILE": 1}
    write_table(table_of.read_table(), tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == table_of.FILE.read_text()  # an entry is a line, changed or not


@pytest.mark.parametrize("work", list(works(torch.device("cpu"))), ids=lambda work: f"{work.op}-{work.size}")
def test_every_work_is_of_an_op_in_the_table_and_changes_what_it_has(work):
    present = table_of.find(table_of.read_table(), work.op, work.size, "default")
    assert work.above < work.size <= (work.up_to or work.size)
    for candidate in work.candidates:
        assert candidate.keys() <= present.keys()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("[]", "an object of ops for each device"),
        ('{"GPU": {}}', "an object of ops for each device"),
        ('{"GPU": {"op": []}, "default": {"op": 3}}', "default, op is not a list"),
        ('{"default": {"op": []}}', "default, op is not a list"),
        ('{"default": {"op": [{"TILE": 32, "up_to": 9}]}}', "must be for every size"),
        ('{"default": {"op": [{"TILE": 32}]}, "GPU": {"op": [{"tile": 32}]}}', "the unknown setting tile"),
        ('{"default": {"op": [{"TILE": 32}]}, "GPU": {"op": [{"up_to": 32}]}}', "an entry without TILE"),
        *(
            (json.dumps({"default": {"op": [{"TILE": 32}]}, "GPU": {"op": [{"TILE": value}]}}), "GPU, op has TILE = ")
            for value in (0, -32, 48, 1 << 40, 32.0, "32", True, None, [32], float("nan"))
        ),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_table_that_no_kernel_can_use_is_refused(tmp_path, text, problem):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} is no table of block sizes: .*{problem}"):
        table_of.read_table(file)


def test_ops_of_another_version_are_no_mistake(tmp_path):
    file = tmp_path / "table.json"
    write_table(TABLE | {"GPU": {"later op": [{"WIDTH": 3}]}}, file)
    assert table_of.find(table_of.read_table(file), "op", 50, "GPU") == {"TILE": 32}
    with pytest.raises(ValueError, match="has no later op under default"):
        table_of.find(table_of.read_table(file), "later op", 50, "GPU")


@pytest.mark.parametrize("bad", ["no GPU", "unknown op", "broken table", "no such folder", "folder in the way"])
def test_the_tuner_tells_a_mistake_before_it_measures(bad, tmp_path, monkeypatch, capsys):
    out, broken = tmp_path / "out.json", tmp_path / "broken.json"
    broken.write_text("{")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bad != "no GPU")
    monkeypatch.setattr(tuner, "tune", lambda *_, **__: pytest.fail("measured"))
    words = ["tune", "--out", str(out / "below" if bad == "no such folder" else out)]
    if bad == "unknown op":
        words += ["--ops", "sample", "shuffle"]
    if bad == "broken table":
        monkeypatch.setattr(tuner, "read_table", lambda: table_of.read_table(broken))
    if bad == "folder in the way":
        os.mkdir(out)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        tuner.main()
    assert ended.value.code == 2
    expected = {"no GPU": "there is no GPU", "unknown op": "'shuffle'", "broken table": str(broken)}
    assert expected.get(bad, str(out)) in capsys.readouterr().err
