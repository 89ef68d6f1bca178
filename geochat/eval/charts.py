"""Plots of a report, as PNG: headline figures, groups of a stratum, and what classes are taken for."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from geochat.eval.measures import Measure

WRITTEN = 12  # a confusion matrix of more labels shows shades alone


def score_bars(names: Sequence[str], groups: Sequence[tuple[str, Sequence[Measure]]], title: str) -> bytes:
    """One group of upright bars per task, one bar per run, with its 95 % interval."""
    figure, axes = _canvas(max(5.0, 1.5 + 1.15 * len(groups)), 3.8, title)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [i - 0.4 + width * (number + 0.5) for i in range(len(groups))]
        heights, error = _with_error([measures[number] for _, measures in groups])
        drawn = axes.bar(places, heights, width * 0.92, yerr=error, label=name, capsize=2, ecolor="#0008")
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=8)
    axes.set(ylim=(0, max(109, axes.get_ylim()[1])), ylabel="%")
    return _png(figure, axes, names)


def strata_bars(names: Sequence[str], groups: Sequence[tuple[str, Sequence[Measure]]], title: str) -> bytes:
    """One group of lying bars per value of a stratum, one bar per run, with its 95 % interval."""
    figure, axes = _canvas(7.0, 1.2 + 0.24 * len(groups) * max(1.0, 0.6 * len(names)), title)
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [i - 0.4 + height * (number + 0.5) for i in range(len(groups))]
        widths, error = _with_error([measures[number] for _, measures in groups])
        axes.barh(places, widths, height * 0.92, xerr=error, label=name, capsize=2, ecolor="#0008")
    counts = [max(measure.n for measure in measures) for _, measures in groups]
    labels = [f"{label} (n = {count})" for (label, _), count in zip(groups, counts, strict=True)]
    axes.set_yticks(range(len(groups)), labels, fontsize=8)
    axes.set(xlim=(0, max(100, axes.get_xlim()[1])), xlabel="%", ylim=(len(groups) - 0.4, -0.6))
    return _png(figure, axes, names)


def confusion_matrix(labels: Sequence[str], counts: np.ndarray, title: str) -> bytes:
    """Counts [true label, answered label or other]; shaded by share of the row."""
    side = 2.2 + 0.28 * len(labels)
    figure, axes = _canvas(side + 0.6, side, title)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(labels) + 1), [*labels, "(other)"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set(xlabel="answered", ylabel="true")
    if len(labels) <= WRITTEN:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=ink)
    return _png(figure, axes, ())


def _canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_error(measures: Sequence[Measure]) -> tuple[list[float], list[list[float]]]:
    """Figures in percent, and how far their intervals reach below and above; not a number draws no whisker."""
    values = [100 * (m.value or 0.0) for m in measures]
    ends = [m.interval or (math.nan, math.nan) for m in measures]
    below = [max(0.0, value - 100 * low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, 100 * high - value) for value, (_, high) in zip(values, ends, strict=True)]
    return values, [below, above]


def _png(figure: Figure, axes: Axes, names: Sequence[str]) -> bytes:
    if len(names) > 1:
        figure.legend(fontsize=8, ncols=len(names), loc="outside lower center", frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return content.getvalue()
