"""The figures that a report shows of a run: each task's headline with its interval, by group, and confusions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from geochat.eval.benchmark import Benchmark
from geochat.eval.compare import Run
from geochat.eval.labels import bare, labels_in
from geochat.eval.score import cell
from geochat.eval.verdicts import Summary

MOST = 50  # groups or labels that one plot can hold


@dataclass(frozen=True)
class Measure:
    n: int
    value: float | None
    interval: tuple[float, float] | None
    """95 % bootstrap interval, questions about one picture drawn together."""
    failed: int
    """Answers that could not be read."""


def measure(run: Run, task: str, column: str = "", value: str = "") -> Measure:
    """A task's headline figure, or that of one group of a stratum; nothing of a task that the run has not."""
    if (scores := run.scores["tasks"].get(task)) is None:
        return Measure(0, None, None, 0)
    summary: Summary = scores["strata"].get(column, {}).get(value, {}) if column else scores["overall"]
    keys = [key for key, v in run.of_task(task).items() if not column or str(v.get(column)) == value]
    figure = summary.get(scores["headline"])
    ends = run.interval(task, keys, figure) if keys else None
    return Measure(summary.get("n", 0), figure, ends, summary.get("failed", 0))


def overview(run: Run) -> list[list[str]]:
    """One row per task, heading first; shares in percent."""
    rows = [["task: figure (%)", "n", "value", "95 % interval", "unreadable"]]
    for task, scores in run.scores["tasks"].items():
        found, figure = measure(run, task), scores["headline"]
        share = f"{found.failed} ({100 * found.failed / found.n:.1f} %)" if found.n else "–"
        ends, value = cell(figure, found.interval), cell(figure, found.value)
        rows.append([f"{task}: {figure}", str(found.n), value, ends, share])
    return rows


def strata(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[tuple[str, list[Measure]]]]]:
    """(task, column, [(value, measure per run)]) for every stratum with more than one and at most 50 values."""
    for task, scores in runs[0].scores["tasks"].items():
        for column, values in scores["strata"].items():
            if 1 < len(values) <= MOST:
                groups = [(value, [measure(run, task, column, value) for run in runs]) for value in values]
                yield task, column, groups


def confusion(run: Run, benchmark: Benchmark, task: str) -> tuple[list[str], np.ndarray] | None:
    """Labels, and counts [true, answered or other]; an answer is a label when it names this one alone.

    None for tasks without labels, with more than 50, or where the answers are not at hand.
    """
    if run.scores["tasks"][task]["metric"] != "exact_match" or not run.answers:
        return None
    said: list[tuple[str, str]] = []
    for key in run.of_task(task):
        row = benchmark.prepare(run.answers[key], key) or {}
        said.append((str(row[benchmark.truth.of(row, key)]), str(row.get("text", row.get("answer")) or "")))
    labels = sorted({truth for truth, _ in said})
    if not 1 < len(labels) <= MOST:
        return None
    places = {bare(label): i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), dtype=int)
    for truth, text in said:
        named = labels_in(text, places)
        counts[places[bare(truth)], places[named.pop()] if len(named) == 1 else -1] += 1
    return labels, counts
