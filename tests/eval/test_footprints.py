"""Polygons: exact overlap against counted pixels, and figures that failures do not drop out of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.eval.footprints import judge_footprint, overlap, parse_points
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import Question

SQUARE = "[(0, 0), (100, 0), (100, 100), (0, 100)]"
L_SHAPE = "[(0, 0), (100, 0), (100, 50), (50, 50), (50, 100), (0, 100)]"


def test_points() -> None:
    assert parse_points("The polygon is [(1, 2), (3, 4), (5, 6)].") == [(1, 2), (3, 4), (5, 6)]
    assert parse_points("[[1, 2], [3, 4], [5, 6]]") == [(1, 2), (3, 4), (5, 6)]
    for text in ("", "no building", "[(1, 2), (3, 4)]", "[(1, 2), (3, 4), (5, 6), 7]"):
        assert parse_points(text) == []


def test_a_polygon_that_is_not_convex() -> None:
    verdict = judge_footprint(L_SHAPE, Question(SQUARE))
    assert verdict["iou"] == pytest.approx(0.75)  # its hull would give 0.875
    assert verdict["c_iou"] == pytest.approx(0.75 * (1 - 2 / 10))


def test_a_repeated_corner_costs() -> None:
    answer = SQUARE.replace("[(0, 0)", "[(0, 0), (50, 0)")
    verdict = judge_footprint(answer, Question(SQUARE))
    assert (verdict["iou"], verdict["c_iou"]) == (pytest.approx(1), pytest.approx(8 / 9))


def test_failures_count_as_nothing() -> None:
    verdicts = [
        judge_footprint(answer, Question(SQUARE)) for answer in (SQUARE, "none", "[(1, 1), (2, 2), (3, 3)]")
    ]
    summary = METRICS["footprint"].summarise(verdicts)
    assert (summary["n"], summary["failed"]) == (3, 1)
    assert summary["c_iou"] == summary["mean_iou"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="holds no polygon"):
        judge_footprint(SQUARE, Question("none"))


corner = st.tuples(st.integers(0, 40), st.integers(0, 40))


@given(st.lists(corner, min_size=3, max_size=6), st.lists(corner, min_size=3, max_size=6))
def test_overlap_is_that_of_counted_points(first: list, second: list) -> None:
    # Points off every line between whole corners; a polygon that crosses itself counts by the even-odd rule.
    centres = np.arange(0.137, 40, 0.25)
    x, y = np.meshgrid(centres, centres + 0.0119)
    a, b = even_odd(first, x, y), even_odd(second, x, y)
    if not (a.any() and b.any()):
        return
    edges = sum(
        np.hypot(*np.subtract(p, q)) for poly in (first, second) for p, q in zip(poly, [*poly[1:], poly[0]])
    )
    tolerance = 2 * edges * 0.25 / (np.count_nonzero(a | b) * 0.25**2)
    assert abs(overlap(first, second) - np.count_nonzero(a & b) / np.count_nonzero(a | b)) <= tolerance


def even_odd(polygon: list, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether a ray to the right crosses the outline an odd number of times."""
    odd = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]]):
        if y1 != y2:
            odd ^= ((y1 <= y) != (y2 <= y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return odd
