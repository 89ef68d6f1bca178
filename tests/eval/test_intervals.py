"""Bootstrap intervals and paired tests against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from geochat.eval.intervals import interval, mcnemar, paired, parts


def shares(right: int, wrong: int) -> list[tuple[float, float]]:
    return [(1.0, 1.0)] * right + [(0.0, 1.0)] * wrong


def test_interval_of_a_share_is_the_normal_one() -> None:
    low, high = interval(shares(300, 700), [str(i) for i in range(1000)])
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    assert interval(shares(300, 700), [str(i) for i in range(1000)]) == (low, high)  # the same each time


def test_questions_about_one_picture_are_one_draw() -> None:
    """Ten copies of each question on the same picture say no more than one of each."""
    alone = interval(shares(30, 70), [str(i) for i in range(100)])
    copied = interval([s for s in shares(30, 70) for _ in range(10)], [str(i // 10) for i in range(1000)])
    assert copied == pytest.approx(alone, abs=1e-12)


def test_a_ratio_weighs_questions_by_what_is_below() -> None:
    """Pictures of one and of nine boxes: the figure is over boxes, so that its interval lies about 0.9, not 0.5."""
    sums = [(0.0, 1.0), (9.0, 9.0)] * 200
    low, high = interval(sums, [str(i) for i in range(400)])
    assert low < 0.9 < high
    assert high - low < 0.06


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = interval(shares(30, 70), [str(i) for i in range(100)])
    monkeypatch.setattr("geochat.eval.intervals.CELLS", 700)
    assert interval(shares(30, 70), [str(i) for i in range(100)]) == whole


def test_nothing_to_divide_by() -> None:
    assert interval([(0.0, 0.0)] * 3, ["a", "b", "c"]) is None
    assert paired([(0.0, 0.0)] * 3, [(0.0, 0.0)] * 3, ["a", "b", "c"]) == (None, None)


def test_a_steady_gain_is_sure_and_noise_is_not() -> None:
    random = np.random.default_rng(1)
    base = random.random(300)
    pictures = [str(i) for i in range(300)]
    ends, p = paired([(v, 1.0) for v in base], [(v + 0.1, 1.0) for v in base], pictures)
    assert ends == pytest.approx((0.1, 0.1))
    assert p < 0.002
    noise = base + random.normal(0, 0.1, 300)
    ends, p = paired([(v, 1.0) for v in base], [(v, 1.0) for v in noise], pictures)
    assert ends[0] < 0 < ends[1]
    assert p > 0.05


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 6), (6, 1), (5, 5), (0, 10)])
def test_mcnemar_is_the_binomial_sum(lost: int, gained: int) -> None:
    n, least = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail))


def test_parts_of_verdicts() -> None:
    assert parts({"correct": True}, "accuracy") == (1, 1)
    assert parts({"ious": [0.6, 0.3, 0.0], "predicted": 9}, "recall@0.5") == (1, 3)
    assert parts({"ious": [0.6, 0.3, 0.0], "predicted": 9}, "recall@0.25") == (2, 3)
    assert parts({"rougeL": 0.7}, "rougeL") == (0.7, 1)
    assert parts({"error": None}, "error") == (0, 0)
