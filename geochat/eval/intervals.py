"""How sure a figure is: bootstrap intervals and paired tests over verdicts. Questions about one picture are drawn together.

A figure is a ratio of sums over questions (accuracy: right answers ÷ questions; recall: found boxes ÷ true boxes), or the
mean of such ratios over classes, so that a draw needs no more than the sums of each picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geochat.eval.files import Row
from geochat.eval.verdicts import wilson

DRAWS = 2000
SEED = 20240229
CELLS = 4_000_000  # of one block of draws: 32 MB

LOWER_IS_BETTER = ("mean_absolute_error", "mean_relative_error")


def sums(verdicts: Sequence[Row], figure: str) -> np.ndarray:
    """What each question adds to numerator and denominator of each ratio: float [question, ratio, 2]."""
    if figure == "circular_accuracy":
        return _circles(verdicts)
    if figure == "class_f1":
        return _classes(verdicts)
    return np.array([[_part(verdict, figure)] for verdict in verdicts], dtype=float)


def figure_of(totals: np.ndarray) -> np.ndarray:
    """The mean of the ratios that have something below: [..., ratio, 2] → [...]; not a number where none has."""
    above, below = totals[..., 0], totals[..., 1]
    ratios = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    counted = (below > 0).sum(axis=-1)
    nothing = np.full(counted.shape, np.nan)
    return np.divide(ratios.sum(axis=-1), counted, out=nothing, where=counted > 0)


def grades(parts: np.ndarray, figure: str) -> np.ndarray:
    """How well each question was answered, from its `sums`: 1 is right; below it, the lower the worse."""
    alone = figure_of(parts)
    if figure in LOWER_IS_BETTER:
        return np.where(np.isnan(alone), -np.inf, 1 - alone)
    return np.where(np.isnan(alone), 1.0, alone)


def interval(parts: np.ndarray, pictures: Sequence[str]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the figure. None where there is nothing to divide by, or only one picture to draw.

    Where all questions are right, or all wrong, every draw is alike: then Wilson's interval, with pictures as trials.
    """
    ends, trials = _ends(figure_of(_draws(parts, pictures))), len(set(pictures))
    if ends in ((0.0, 0.0), (1.0, 1.0)):
        return wilson(round(ends[0]) * trials, trials)
    return ends if trials > 1 else None


def paired(
    first: np.ndarray, second: np.ndarray, pictures: Sequence[str]
) -> tuple[tuple[float, float] | None, float | None]:
    """Second's figure minus first's on the same questions: its 95 % interval, and the two-sided bootstrap p-value. Neither
    where there is nothing to divide by, or only one picture to draw."""
    drawn = _draws(np.concatenate([first, second], axis=1), pictures)
    gain = figure_of(drawn[:, first.shape[1] :]) - figure_of(drawn[:, : first.shape[1]])
    gain = gain[~np.isnan(gain)]
    if not len(gain) or len(set(pictures)) == 1:
        return None, None
    tail = min((gain <= 0).sum(), (gain >= 0).sum())
    return _ends(gain), min(1.0, 2 * (int(tail) + 1) / (len(gain) + 1))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value that as many answers turned right as wrong (Q. McNemar, 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _part(verdict: Row, figure: str) -> tuple[float, float]:
    name, _, threshold = figure.partition("@")
    if "ious" in verdict:
        return float(sum(iou >= float(threshold) for iou in verdict["ious"])), float(len(verdict["ious"]))
    if name == "mean_relative_error":
        return float(sum(verdict["relative"])), float(len(verdict["relative"]))
    value = verdict["correct"] if name == "accuracy" and not threshold else verdict.get(figure)
    return (0.0, 0.0) if value is None else (float(value), 1.0)


def _circles(verdicts: Sequence[Row]) -> np.ndarray:
    """A question asked with its options in several orders counts once, at its first turn."""
    right: dict[int, bool] = {}
    for verdict in verdicts:
        right[verdict["circle"]] = right.get(verdict["circle"], True) and verdict["correct"]
    return np.array([[_once(right, verdict["circle"])] for verdict in verdicts])


def _once(right: dict[int, bool], circle: int) -> tuple[float, float]:
    return (float(right.pop(circle)), 1.0) if circle in right else (0.0, 0.0)


def _classes(verdicts: Sequence[Row]) -> np.ndarray:
    """F1 of each class that is a truth: 2 · hits ÷ (true + named)."""
    classes = sorted({label for verdict in verdicts for label in verdict["labels"]})
    true, named = (
        np.array([[label in verdict[key] for label in classes] for verdict in verdicts], dtype=float)
        for key in ("labels", "named")
    )
    return np.stack([2 * true * named, true + named], axis=-1)


def _draws(parts: np.ndarray, pictures: Sequence[str]) -> np.ndarray:
    """Totals [draw, ratio, 2] over as many pictures as there are, drawn with replacement."""
    _, codes = np.unique(np.asarray(pictures), return_inverse=True)
    count = int(codes.max()) + 1
    flat = parts.reshape(len(parts), -1)
    by_picture = np.stack([np.bincount(codes, weights=column) for column in flat.T], axis=1)
    random, block = np.random.default_rng(SEED), max(1, CELLS // count)
    totals = []
    for start in range(0, DRAWS, block):
        rows = min(block, DRAWS - start)
        chosen = random.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        totals.append(np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count) @ by_picture)
    return np.concatenate(totals).reshape(DRAWS, *parts.shape[1:])


def _ends(values: np.ndarray) -> tuple[float, float] | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
