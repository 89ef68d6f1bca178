"""How sure a figure is: bootstrap intervals and paired tests over verdicts. Questions about one picture are drawn together.

A figure is a ratio of sums over questions (accuracy: right answers ÷ questions; recall: found boxes ÷ true boxes), so
that a draw needs no more than the sums of each picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geochat.eval.files import Row

DRAWS = 2000
SEED = 20240229
CELLS = 4_000_000  # of one block of draws: 32 MB


def parts(verdict: Row, figure: str) -> tuple[float, float]:
    """What one question adds to the two sums whose ratio is the figure; (0, 0) where it adds nothing."""
    if "ious" in verdict:
        threshold = float(figure.rpartition("@")[2])
        return float(sum(iou >= threshold for iou in verdict["ious"])), float(len(verdict["ious"]))
    value = verdict["correct"] if figure == "accuracy" else verdict.get(figure)
    return (0.0, 0.0) if value is None else (float(value), 1.0)


def interval(sums: Sequence[tuple[float, float]], pictures: Sequence[str]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the ratio; `sums` [question, 2]. None where there is nothing to divide by."""
    return _ends(_ratio(_draws(np.asarray(sums, dtype=float), pictures)))


def paired(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], pictures: Sequence[str]
) -> tuple[tuple[float, float] | None, float | None]:
    """Second's ratio minus first's on the same questions: its 95 % interval, and the two-sided bootstrap p-value."""
    drawn = _draws(np.hstack([np.asarray(first, dtype=float), np.asarray(second, dtype=float)]), pictures)
    gain = _ratio(drawn[:, 2:]) - _ratio(drawn[:, :2])
    gain = gain[~np.isnan(gain)]
    if not len(gain):
        return None, None
    tail = min((gain <= 0).sum(), (gain >= 0).sum())
    return _ends(gain), min(1.0, 2 * (int(tail) + 1) / (len(gain) + 1))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value that as many answers turned right as wrong (Q. McNemar, 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _draws(sums: np.ndarray, pictures: Sequence[str]) -> np.ndarray:
    """Sums [draw, column] over as many pictures as there are, drawn with replacement; from [question, column]."""
    _, codes = np.unique(np.asarray(pictures), return_inverse=True)
    count = int(codes.max()) + 1
    by_picture = np.stack([np.bincount(codes, weights=column) for column in sums.T], axis=1)
    random, block = np.random.default_rng(SEED), max(1, CELLS // count)
    drawn = np.empty((DRAWS, sums.shape[1]))
    for start in range(0, DRAWS, block):
        chosen = random.integers(0, count, size=(min(block, DRAWS - start), count))
        for column in range(sums.shape[1]):
            drawn[start : start + block, column] = by_picture[chosen, column].sum(axis=1)
    return drawn


def _ratio(drawn: np.ndarray) -> np.ndarray:
    return np.divide(drawn[:, 0], drawn[:, 1], out=np.full(len(drawn), np.nan), where=drawn[:, 1] > 0)


def _ends(values: np.ndarray) -> tuple[float, float] | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
