"""Tables as text: nothing is cut, and what can stand in columns does."""

import pytest

from grpo.observe import Table, table_lines, terminal

RUNS = [f"lr=1e-05,seed={seed}" for seed in range(4)]
PATH = "/data/weights/inception/inception-2015-12-05-of-a-long-name.safetensors"


def words(lines):
    return [line.split() for line in lines if line]


def test_rows_that_fit_stand_under_the_runs():
    table = Table("At the end", RUNS[:2], [("Reward", ["1", "2 (+1)"]), ("Loss", ["0.5", "-"])], "a note")
    assert list(table_lines(table, 80)) == [
        "At the end",
        "          lr=1e-05,seed=0  lr=1e-05,seed=1",
        "  Reward                1           2 (+1)",
        "  Loss                0.5                -",
        "",
        "  a note",
    ]


def test_a_label_of_many_words_takes_several_lines():
    rows = [("base", ["1.00", "2.00"]), ("base, guidance 1.25, as-before", ["0.50", "-"])]
    assert list(table_lines(Table("", ["reward", "accuracy"], rows), 35)) == [
        "                   reward  accuracy",
        "  base               1.00      2.00",
        "  base, guidance     0.50         -",
        "  1.25, as-before",
    ]


def test_of_many_runs_each_has_a_line():
    rows = [(f"metric_{row}", [f"{row}.{run}" for run in range(4)]) for row in range(8)]
    lines = list(table_lines(Table("At the end", RUNS, rows), 64))
    assert words(lines)[1:6] == [
        [f"metric_{row}" for row in range(4)],
        *([run, *(f"{row}.{number}" for row in range(4))] for number, run in enumerate(RUNS)),
    ]
    assert lines[6] == ""  # then the other rows
    assert words(table_lines(Table("At the end", RUNS, rows), 200))[1] == RUNS


def test_long_texts_are_lists_and_stay_whole():
    rows = [("optimizer.lr", ["1", "2"]), ("reward.loo_fid.feature_checkpoint", ["-", PATH]), ("lora.rank", ["0", "8"])]
    lines = list(table_lines(Table("", RUNS[:2], rows), 80))
    assert words(lines) == [
        RUNS[:2], ["optimizer.lr", "1", "2"], ["lora.rank", "0", "8"],
        ["reward.loo_fid.feature_checkpoint"], [RUNS[0], "-"], [RUNS[1], PATH],
    ]  # fmt: skip
    assert [line for line in lines if len(line) > 80] == [f"    {RUNS[1]}  {PATH}"]


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_columns_line_up_whatever_the_letters(runs):
    rows = [("loss", ["1"] * runs), ("verlust", ["2"] * runs)]
    lines = list(table_lines(Table("", ["損失" * 3] * runs, rows), 40))
    assert len({terminal.cell_len(line) for line in lines if line}) == 1


def test_work_grows_with_the_rows(monkeypatch):
    looks = []
    measure = terminal.cell_len
    monkeypatch.setattr(terminal, "cell_len", lambda text: looks.append(text) or measure(text))

    def count(rows):
        looks.clear()
        for columns in (2, 9):
            table = Table(
                "", RUNS[:2] * (columns // 2), [(f"k{row:06}", ["1"] * (columns // 2 * 2)) for row in range(rows)]
            )
            assert sum(1 for _ in table_lines(table, 80)) > rows / 9
        return len(looks)

    assert count(2000) < 2.2 * count(1000)


def test_a_table_without_rows_is_a_line():
    assert list(table_lines(Table("result.json", RUNS, [], "Not measured alike"), 80)) == [
        "result.json: nothing. Not measured alike"
    ]
