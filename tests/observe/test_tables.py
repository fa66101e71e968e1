"""Numbers beside each other: their digits, their differences, the best, and what is said of them."""

import math

import pytest

from grpo.observe import Cell, Results
from grpo.observe.tables import compared, with_interval


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.4182, 0.2109], ["0.418", "0.211 (-0.207)"]),
        ([2.5432, 2.5398], ["2.5432", "2.5398 (-0.0034)"]),  # as many digits as tell them apart
        ([2.5432, 2.5431999], ["2.5432", "2.5432 (-0.0000)"]),  # but two more at most
        ([38.5, 77.0], ["38.5", "77.0 (+38.5)"]),
        ([20, 40, 20], ["20", "40 (+20)", "20"]),
        ([1e-5, 3e-5], ["1e-05", "3e-05 (+2e-05)"]),
        ([1.5e7, 1e7], ["1.5e+07", "1e+07 (-5e+06)"]),
        ([0.0, 0.0], ["0", "0"]),
        ([None, 0.5], ["-", "0.500"]),
        ([0.5, None, math.nan], ["0.500", "-", "nan"]),
        ([math.inf, 1.0], ["inf", "1"]),
        ([1e308, -1e308], ["1e+308", "-1e+308 (-inf)"]),
        ([], []),
    ],
)
def test_digits_are_those_that_tell_the_values_apart(values, shown):
    assert [*map(str, compared(values))] == shown


def test_the_best_is_marked_and_changes_are_judged():
    lower = compared([3.0, 2.0, None, 2.0, 4.0], better="lower")
    assert [cell.best for cell in lower] == [False, True, False, True, False]
    assert [cell.improved for cell in lower] == [None, True, None, True, False]
    assert [cell.best for cell in compared([3.0, 2.0], better="higher")] == [True, False]
    assert not any(cell.best or cell.improved is not None for cell in compared([3.0, 2.0]))
    assert not any(cell.best for cell in compared([2.0, 2.0], better="lower"))


def test_results_are_told_in_a_sentence_and_turned():
    values = {"FID": [4.0, 9.0, 2.0], "recall": [0.9, 0.7, 0.8], "entropy": [2.0, 1.0, 1.5]}
    results = Results(["base", "rival", "tuned"], values, {"FID": "lower", "recall": "higher"})
    assert results.verdict() == "Tuned against base: better in FID (4 to 2); worse in recall (0.900 to 0.800)."
    table, turned = results.by_name("a"), results.by_metric("b")
    assert (table.columns, turned.columns) == (list(values), list(results.names))
    assert table.rows[2] == ("tuned", [row[2] for _, row in turned.rows])
    assert turned.rows[0][1] == [Cell("4"), Cell("9", "+5", False), Cell("2", "-2", True, True)]
    assert Results(["base"], {"FID": [4.0]}, {"FID": "lower"}).verdict() == ""


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [(39.0, 6.353, "39.0 ± 6.4"), (0.5, 0.0123, "0.500 ± 0.012"), (24.0, 0.0, "24 ± 0"), (1234.0, 210.0, "1234 ± 210")],
)
def test_a_mean_has_the_digits_of_its_interval(mean, half, shown):
    assert with_interval(mean, half) == shown
