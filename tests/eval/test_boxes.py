"""Boxes: matching, IoU against shapely and against pixels, figures counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geochat.data.boxes import Box
from geochat.eval.boxes import judge_boxes, judge_permille, match_boxes, truth_polygons
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import Question


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
    assert (verdict["parsed"], verdict["predicted"], verdict["ious"]) == (True, 0, [])
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


@settings(max_examples=40)
@given(boxes, boxes)
def test_iou_is_that_of_counted_pixels(a: Box, b: Box) -> None:
    # Cell centres of a grid twice as fine as the image; its error is bounded by the cells that edges cross.
    side, cells = 100, 200
    centres = (np.arange(cells * 2) + 0.5) * side / cells - side / 2
    x, y = np.meshgrid(centres, centres)
    first, second = inside(a, x, y), inside(b, x, y)
    shared, union = np.count_nonzero(first & second), np.count_nonzero(first | second)
    around = sum(2 * (abs(box.x2 - box.x1) + abs(box.y2 - box.y1)) for box in (a, b)) * cells / side
    error = 1.5 * around / union
    assert abs(a.iou(b, side, side) - shared / union) <= error


def inside(box: Box, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a box of an image of 100 pixels: turned back, they lie in the upright one."""
    angle = np.radians(box.angle)
    dx, dy = x - (box.x1 + box.x2) / 2, y - (box.y1 + box.y2) / 2
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return (abs(u) <= (box.x2 - box.x1) / 2) & (abs(v) <= (box.y2 - box.y1) / 2)


@given(st.text(alphabet="{}<>|[](),.-0123456789 deli", max_size=60))
def test_any_answer_gets_a_verdict(answer: str) -> None:
    for judge, truth in ((judge_boxes, square(1, 1).tolist()), (judge_permille, [1, 1, 9, 9])):
        verdict = judge(answer, Question(truth, (100, 80)))
        assert len(verdict["ious"]) == 1
        assert verdict["parsed"] == (verdict["predicted"] > 0)


# -- VHM's upright boxes


def test_thousandths_against_pixels() -> None:
    wide = Question("[[100, 40, 200, 80]]", (1000, 400))
    assert judge_permille("[[100, 100, 200, 200]]", wide)["ious"] == [1.0]
    assert judge_permille("[[100, 40, 200, 80]]", wide)["ious"][0] < 0.2  # width and height are not exchanged
    assert judge_permille("(100, 100, 200, 200)", Question([100, 40, 200, 80], (1000, 400)))["ious"] == [1.0]


def test_an_answer_of_too_few_numbers_is_a_miss_and_not_the_last_answer_again() -> None:
    question = Question("[10, 10, 30, 30]", (100, 100))
    verdicts = [judge_permille(text, question) for text in ("[100, 100, 300, 300]", "[[1, 2, 3]]", "none")]
    summary = METRICS["boxes_permille"].summarise(verdicts)
    assert (summary["failed"], summary["recall@0.5"]) == (2, pytest.approx(1 / 3))


def test_areas_are_those_of_the_true_box() -> None:
    for side, name in ((32, "S"), (33, "M"), (96, "M"), (97, "L")):
        verdict = judge_permille("", Question([0, 0, side, side], (800, 800)))
        assert verdict["strata"] == {"objects": "single", "area": name}
    assert METRICS["boxes_permille"].summarise([])["recall@0.5"] is None


def test_a_truth_that_is_no_box_is_named() -> None:
    with pytest.raises(ValueError, match="holds no box"):
        judge_permille("", Question("somewhere", (8, 8)))
    with pytest.raises(ValueError, match="width and height"):
        judge_permille("", Question([1, 2, 3, 4]))
