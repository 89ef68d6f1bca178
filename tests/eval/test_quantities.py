"""Counts and measurements: parsing, and errors that failures do not hide."""

from __future__ import annotations

import pytest

from geochat.eval.metrics import METRICS
from geochat.eval.quantities import NUMBER_WORDS, judge_count, judge_measures, parse_count, parse_measures
from geochat.eval.verdicts import Question, wilson


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3), ("There are 12 ships.", 12), ("1,000", 1000), ("2.5 m", 2.5), ("twenty-one", 21), ("Twenty one", 21),
        ("zero", 0), ("no ships", 0), ("none", 0), ("nineteen or 4", 4), ("north", None), ("", None), ("many", None),
    ],
)  # fmt: skip
def test_parse_count(text: str, number: float | None) -> None:
    assert parse_count(text) == number


def test_number_words_are_complete() -> None:
    assert sorted(NUMBER_WORDS.values()) == list(range(100))


def test_count_keeps_failures() -> None:
    verdicts = [judge_count(answer, Question(4)) for answer in ("4", "six", "", "a few")]
    summary = METRICS["count"].summarise(verdicts)
    assert (summary["n"], summary["parsed"], summary["failed"]) == (4, 2, 2)
    assert summary["accuracy"] == 0.25
    assert summary["mean_absolute_error"] == 1.0


def test_wilson() -> None:
    low, high = wilson(1774, 2100)
    assert (low, high) == (pytest.approx(0.8287, abs=1e-4), pytest.approx(0.8596, abs=1e-4))
    assert wilson(0, 0) is None
    assert wilson(0, 10)[0] == 0.0


def test_count_errors_and_ranges() -> None:
    verdicts = [
        judge_count(answer, Question(truth)) for answer, truth in (("3", 0), ("1,000", 2000), ("", 5))
    ]
    assert [v["strata"]["range"] for v in verdicts] == ["0", "above 12", "3–6"]
    summary = METRICS["count"].summarise(verdicts)
    assert summary["mean_absolute_error"] == (3 + 1000) / 2
    assert summary["mean_relative_error"] == 0.5  # a truth of 0 has none, and divides by nothing
    assert (summary["n"], summary["failed"], summary["correct"]) == (3, 1, 0)
    assert [judge_count("", Question(n))["strata"]["range"] for n in (1, 2, 3, 6, 7, 12)] == [
        "1–2", "1–2", "3–6", "3–6", "7–12", "7–12",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("The length is 41.15m and the width is: 38.89m.", [41.15, 38.89]),
        ("0.3m", [0.3]), (".5", [0.5]), ("1,038.5 m", [1038.5]), ("-2 to +3", [-2, 3]), ("10-20", [10, 20]), ("", []),
    ],
)  # fmt: skip
def test_parse_measures(text: str, numbers: list[float]) -> None:
    assert parse_measures(text) == numbers


def test_measures_are_pooled_over_numbers_and_failures_are_counted() -> None:
    truth = "length 40m, width 20m"
    verdicts = [judge_measures(answer, Question(truth)) for answer in ("44m by 20m", "44m", "no idea")]
    summary = METRICS["measures"].summarise(verdicts)
    assert (summary["n"], summary["parsed"], summary["failed"]) == (3, 1, 2)
    assert summary["mean_absolute_error"] == 2
    assert summary["mean_relative_error"] == pytest.approx(0.05)
    assert summary["accuracy"] == 0


def test_nothing_read_is_no_division() -> None:
    for metric, judge in (("count", judge_count), ("measures", judge_measures)):
        summary = METRICS[metric].summarise(
            [judge("none at hand" if metric == "measures" else "many", Question("7"))]
        )
        assert summary["mean_absolute_error"] is None
        assert summary["failed"] == 1
    with pytest.raises(ValueError, match="holds no number"):
        judge_measures("3", Question("unknown"))
