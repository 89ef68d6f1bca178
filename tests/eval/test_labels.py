"""Answers that name labels: hand-counted cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.eval.labels import judge_exact, judge_labels, judge_word, labels_in, split_labels, squeeze
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import Question

YES_NO = frozenset({"yes", "no"})
SCENES = frozenset({"denseresidential", "river", "park", "parking"})


@pytest.mark.parametrize(
    ("answer", "truth", "labels", "strict", "lenient", "parsed"),
    [
        ("Yes", "yes", YES_NO, True, True, True),
        ("yes.", "yes", YES_NO, True, True, True),
        ("Dense Residential", "DenseResidential", SCENES, True, True, True),
        ("It is a dense residential area.", "DenseResidential", SCENES, False, True, True),
        ("Yes, there is a road.", "yes", YES_NO, False, True, True),
        ("No, there is not", "yes", YES_NO, False, False, True),
        ("yes or no", "yes", YES_NO, False, False, True),
        ("", "yes", YES_NO, False, False, False),
        (" . ", "yes", YES_NO, False, False, False),
        ("y", "yes", YES_NO, False, False, False),
        ("unknown", "no", YES_NO, False, False, False),  # "no" inside a word is no answer
        ("parking", "park", SCENES, False, False, True),
        ("two", "2", frozenset({"1", "2"}), False, True, True),
        ("there are 2 ships", "2", frozenset({"1", "2"}), False, True, True),
        ("12", "2", frozenset({"1", "2"}), False, False, False),
    ],
)
def test_exact_match(answer, truth, labels, strict, lenient, parsed) -> None:
    verdict = judge_exact(answer, Question(truth, labels=labels))
    assert (verdict["correct"], verdict["lenient"], verdict["parsed"]) == (strict, lenient, parsed)


@given(st.text())
def test_an_empty_answer_is_never_right(truth: str) -> None:
    for empty in ("", " ", ".", "\n"):
        verdict = judge_exact(empty, Question(truth, labels=frozenset({truth})))
        assert not verdict["correct"]
        assert not verdict["lenient"] or squeeze(truth) == squeeze(empty) != ""
        assert not judge_word(empty, Question(truth))["correct"]


@given(st.text(), st.text())
def test_strict_implies_lenient_and_parsed(answer: str, truth: str) -> None:
    verdict = judge_exact(answer, Question(truth))
    assert not verdict["correct"] or (verdict["lenient"] and verdict["parsed"])


def test_labels_are_whole_words_and_the_longest_wins() -> None:
    labels = {"ship", "cargoship", "storagetank"}
    assert labels_in("two cargo ships", labels) == set()
    assert labels_in("a Cargo-ship beside a storage tank", labels) == {"cargoship", "storagetank"}
    assert labels_in("1,000 of twenty one", {"1000", "21", "1"}) == {"1000", "21"}


@pytest.mark.parametrize(
    ("answer", "word", "right"),
    [
        ("1 gray ship at the left", "ship", True),
        ("<p>1 gray ship</p>", "ship", True),
        ("a storagetank", "storage tank", True),
        ("ships", "ship", False),
        ("spaceship", "ship", False),
        ("", "ship", False),
    ],
)
def test_class_word(answer: str, word: str, right: bool) -> None:
    assert judge_word(answer, Question(word))["correct"] is right


def test_an_empty_or_short_answer_is_not_part_of_the_truth() -> None:
    # "pred in truth" of the original scorer lets "", "r" and "residential" pass, and "Yes." fail.
    assert not any(judge_exact(answer, Question("river"))["lenient"] for answer in ("", "r", "riv"))
    assert judge_exact("Yes.", Question("yes"))["correct"]


COLOURS = frozenset({"white", "gray", "red", "darkgray"})


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("white, gray", ["gray", "white"]),
        ("The ship is white and gray.", ["gray", "white"]),
        ("white", ["white"]),
        ("dark gray", ["darkgray"]),  # no "gray" inside a longer label
        ("whitewashed", []),
    ],
)
def test_labels_as_a_set(answer: str, named: list[str]) -> None:
    verdict = judge_labels(answer, Question("white, gray", labels=COLOURS))
    assert verdict["named"] == named
    assert verdict["parsed"] == bool(named)
    assert verdict["correct"] == (named == ["gray", "white"])


def test_labels_of_a_truth() -> None:
    assert split_labels("water, irrigated land and forest.") == ["water", "irrigated land", "forest"]
    assert split_labels(["water"]) == ["water"]
    with pytest.raises(ValueError, match="lists no label"):
        split_labels(" . ")


def test_labels_summary_counted_by_hand() -> None:
    labels = frozenset({"water", "forest", "town"})
    pairs = [("water, forest", "water"), ("water", "water, town"), ("", "forest")]
    verdicts = [judge_labels(answer, Question(truth, labels=labels)) for answer, truth in pairs]
    summary = METRICS["labels"].summarise(verdicts)
    assert (summary["n"], summary["failed"], summary["classes"]) == (3, 1, 3)
    # precision: forest 0 of 1, town never named, water 2 of 2
    assert summary["class_precision"] == pytest.approx(1 / 3)
    assert summary["class_recall"] == pytest.approx((0 + 0 + 1) / 3)
    assert summary["class_f1"] == pytest.approx(1 / 3)
    assert summary["found"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["sample_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert summary["all_right"] == 0


def test_too_many_labels_cost() -> None:
    # The original's colour score gives the full mark to whoever lists every colour.
    verdict = judge_labels("white, gray, red", Question("white", labels=COLOURS))
    assert not verdict["correct"]
    assert verdict["sample_f1"] == 0.5
