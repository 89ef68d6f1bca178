"""Scorers against hand-counted cases, and against properties that must hold for any boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.data.boxes import Box
from geochat.eval.metrics import (
    METRICS,
    NUMBER_WORDS,
    Question,
    judge_boxes,
    judge_count,
    judge_exact,
    judge_word,
    labels_in,
    match_boxes,
    parse_count,
    squeeze,
    truth_polygons,
    wilson,
)

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


# -- boxes


def square(x: float, y: float, side: float = 10.0) -> np.ndarray:
    return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])


def test_matching_is_one_to_one() -> None:
    truth = [square(0, 0), square(50, 50)]
    assert match_boxes(truth, [square(0, 0), square(0, 0)], "rotated") == [1.0, 0.0]
    assert match_boxes(truth, [square(50, 50), square(0, 0)], "rotated") == [
        1.0,
        1.0,
    ]  # the order does not matter
    assert match_boxes(truth, [], "rotated") == [0.0, 0.0]
    assert match_boxes([], [square(0, 0)], "rotated") == []


def test_matching_takes_the_best_total_not_the_first_come() -> None:
    # Greedy matching would give the first prediction (0.82 with both) to the wrong truth and lose one.
    truth = [square(0, 0), square(2, 0)]
    ious = match_boxes(truth, [square(1, 0), square(-0.5, 0)], "rotated")
    assert min(ious) > 0.5


def test_disjoint_and_tiny_boxes_do_not_overlap() -> None:
    # The "+1 pixel" of several published scorers makes small disjoint boxes overlap.
    assert match_boxes([square(0.10, 0.10, 0.01)], [square(0.12, 0.10, 0.01)], "rotated") == [0.0]
    assert match_boxes([square(5, 5, 0.0)], [square(5, 5, 0.0)], "rotated") == [0.0]  # no area, no exception


def test_hbb_compares_envelopes() -> None:
    size = (100, 100)
    diagonal = Box(20, 45, 80, 55, 45).polygon(*size).tolist()
    other = Box(20, 45, 80, 55, 45).format().replace("|<45>", "|<135>")  # the other diagonal: same envelope
    rotated = judge_boxes(other, Question(diagonal, size))
    hbb = judge_boxes(other, Question(diagonal, size, iou="hbb"))
    assert rotated["ious"][0] < 0.2
    assert hbb["ious"][0] > 0.99


def test_boxes_summary_counted_by_hand() -> None:
    size = (100, 100)
    a, b, c = (square(x, 10).tolist() for x in (10, 40, 70))
    verdicts = [
        judge_boxes("{<10><10><20><20>|<90>}{<40><10><50><20>|<90>}", Question([a, b], size)),  # both found
        judge_boxes("{<10><10><20><20>|<90>}", Question([a, c], size)),  # one of two
        judge_boxes("there is none", Question([c], size)),  # failed
        judge_boxes("{<0><0><5><5>}{<70><10><80><20>}", Question([c], size)),  # found, but not by the first
    ]
    summary = METRICS["boxes"].summarise(verdicts)
    assert (summary["n"], summary["parsed"], summary["failed"]) == (4, 3, 1)
    assert (summary["true_boxes"], summary["predicted_boxes"]) == (6, 5)
    assert summary["recall@0.5"] == pytest.approx(4 / 6)
    assert summary["precision@0.5"] == pytest.approx(4 / 5)
    assert summary["f1@0.5"] == pytest.approx(8 / 11)
    assert summary["all_found@0.5"] == pytest.approx(2 / 4)
    assert (summary["single_questions"], summary["single@0.5"]) == (2, 0.0)
    assert summary["mean_iou"] == pytest.approx(4 / 6)


def test_nothing_to_find() -> None:
    verdict = judge_boxes("An empty desert.", Question([], (10, 10)))
    assert verdict == {"parsed": True, "predicted": 0, "ious": []}
    summary = METRICS["boxes"].summarise([verdict])
    assert summary["recall@0.5"] is None
    assert summary["failed"] == 0


def test_truth_forms() -> None:
    polygon = square(0, 0).tolist()
    assert len(truth_polygons(polygon, (9, 9))) == len(truth_polygons([polygon], (9, 9))) == 1
    assert np.allclose(truth_polygons("{<0><0><10><10>|<0>}", (100, 100))[0], square(0, 0))
    with pytest.raises(ValueError, match="four"):
        truth_polygons([[1, 2, 3, 4]], (9, 9))
    with pytest.raises(ValueError, match="width and height"):
        judge_boxes("{<1><2><3><4>}", Question(polygon))
    assert judge_boxes("", Question(polygon))["ious"] == [
        0.0
    ]  # a question that could not be asked still counts


percent = st.integers(-20, 120)
boxes = st.builds(
    lambda x, y, w, h, a: Box(x, y, x + w, y + h, a), percent, percent, st.integers(1, 60), st.integers(1, 60),
    st.integers(0, 90),
)  # fmt: skip


@given(st.lists(boxes, max_size=4), st.lists(boxes, max_size=4))
def test_box_figures_stay_in_range_and_perfect_is_perfect(truth: list[Box], predicted: list[Box]) -> None:
    size = (120, 80)
    polygons = [box.polygon(*size).tolist() for box in truth]
    own = judge_boxes("".join(box.format() for box in truth), Question(polygons, size))
    assert all(iou > 0.999 for iou in own["ious"])
    verdict = judge_boxes("".join(box.format() for box in predicted), Question(polygons, size))
    summary = METRICS["boxes"].summarise([verdict])
    shares = [value for key, value in summary.items() if "@" in key or key == "mean_iou"]
    assert all(value is None or 0 <= value <= 1 for value in shares)
    assert sum(iou > 0 for iou in verdict["ious"]) <= len(predicted)
