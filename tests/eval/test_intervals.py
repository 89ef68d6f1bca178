"""Bootstrap intervals and paired tests against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from geochat.eval.intervals import figure_of, grades, interval, mcnemar, paired, sums
from geochat.eval.metrics import METRICS


def shares(right: int, wrong: int) -> np.ndarray:
    return pairs([(1.0, 1.0)] * right + [(0.0, 1.0)] * wrong)


def pairs(values: list[tuple[float, float]]) -> np.ndarray:
    return np.array(values)[:, None]


def test_interval_of_a_share_is_the_normal_one() -> None:
    low, high = interval(shares(300, 700), [str(i) for i in range(1000)])
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    assert interval(shares(300, 700), [str(i) for i in range(1000)]) == (low, high)  # the same each time


def test_questions_about_one_picture_are_one_draw() -> None:
    """Ten copies of each question on the same picture say no more than one of each."""
    alone = interval(shares(30, 70), [str(i) for i in range(100)])
    copied = interval(shares(30, 70).repeat(10, axis=0), [str(i // 10) for i in range(1000)])
    assert copied == pytest.approx(alone, abs=1e-12)


def test_a_ratio_weighs_questions_by_what_is_below() -> None:
    """Pictures of one and of nine boxes: the figure is over boxes, so that its interval lies about 0.9, not 0.5."""
    low, high = interval(pairs([(0.0, 1.0), (9.0, 9.0)] * 200), [str(i) for i in range(400)])
    assert low < 0.9 < high
    assert high - low < 0.06


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = interval(shares(30, 70), [str(i) for i in range(100)])
    monkeypatch.setattr("geochat.eval.intervals.CELLS", 700)
    assert interval(shares(30, 70), [str(i) for i in range(100)]) == whole


def test_all_right_is_not_sure_to_be_right() -> None:
    """Twelve questions about four pictures: Wilson's interval of 4 out of 4."""
    low, high = interval(shares(12, 0), [str(i // 3) for i in range(12)])
    assert (low, high) == pytest.approx((4 / (4 + 1.96**2), 1.0))
    assert interval(shares(0, 12), [str(i // 3) for i in range(12)]) == pytest.approx((0.0, 1 - low))


def test_nothing_to_divide_by() -> None:
    nothing = pairs([(0.0, 0.0)] * 3)
    assert interval(nothing, ["a", "b", "c"]) is None
    assert paired(nothing, nothing, ["a", "b", "c"]) == (None, None)


def test_one_picture_says_nothing_of_others() -> None:
    """Every draw would be that picture again: an interval without width, and a gain beyond doubt."""
    assert interval(shares(28, 32), ["a"] * 60) is None
    assert paired(shares(28, 32), shares(29, 31), ["a"] * 60) == (None, None)


def test_a_steady_gain_is_sure_and_noise_is_not() -> None:
    random = np.random.default_rng(1)
    base = random.random(300)
    pictures = [str(i) for i in range(300)]
    ends, p = paired(pairs([(v, 1.0) for v in base]), pairs([(v + 0.1, 1.0) for v in base]), pictures)
    assert ends == pytest.approx((0.1, 0.1))
    assert p < 0.002
    noise = base + random.normal(0, 0.1, 300)
    ends, p = paired(pairs([(v, 1.0) for v in base]), pairs([(v, 1.0) for v in noise]), pictures)
    assert ends[0] < 0 < ends[1]
    assert p > 0.05


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 6), (6, 1), (5, 5), (0, 10)])
def test_mcnemar_is_the_binomial_sum(lost: int, gained: int) -> None:
    n, least = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail))


VERDICTS = {
    "exact_match": [{"correct": i % 3 == 0, "lenient": True} for i in range(7)],
    "boxes": [{"ious": [0.6, 0.3, 0.0], "predicted": 9}, {"ious": [0.5], "predicted": 0}, {"ious": [], "predicted": 1}],
    "labels": [
        {"labels": ["a", "b"], "named": ["a"], "correct": False, "sample_f1": 2 / 3},
        {"labels": ["b"], "named": ["b", "c"], "correct": False, "sample_f1": 2 / 3},
        {"labels": ["c"], "named": [], "correct": False, "sample_f1": 0.0},
    ],
    "circular": [
        {"circle": circle, "turns": 2, "correct": right} for circle, right in ((1, True), (2, True), (1, False), (2, True))
    ],
    "measures": [
        {"errors": [1.0, 2.0], "relative": [0.1, 0.4], "correct": False},
        {"errors": [], "relative": [], "correct": False},
    ],
    "caption": [{"rouge1": 0.5, "rougeL": 0.4, "meteor": 0.3}, {"rouge1": 1.0, "rougeL": 1.0, "meteor": 0.9}],
    "vqa": [{"vqa_accuracy": 0.3}, {"vqa_accuracy": 1.0}],
    "footprint": [{"iou": 0.5, "c_iou": 0.4}, {"iou": 0.1, "c_iou": 0.1}],
}  # fmt: skip


@pytest.mark.parametrize("metric", VERDICTS)
def test_sums_give_the_figure_of_the_metric(metric: str) -> None:
    verdicts = [{"parsed": True, **verdict} for verdict in VERDICTS[metric]]
    figure = METRICS[metric].headline
    value = METRICS[metric].summarise(verdicts)[figure]
    assert figure_of(sums(verdicts, figure).sum(axis=0)) == pytest.approx(value)


def test_grades_of_questions() -> None:
    def grade(metric: str) -> list[float]:
        figure = METRICS[metric].headline
        return grades(sums(VERDICTS[metric], figure), figure).tolist()

    assert grade("boxes") == pytest.approx([1 / 3, 1, 1])
    assert grade("circular") == [0, 1, 1, 1]
    assert grade("measures") == [0.75, -math.inf]  # no number at all is worse than any wrong one
    assert grade("labels") == pytest.approx([1 / 2, 1 / 2, 0])
