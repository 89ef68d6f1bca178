"""Runs side by side: the headline figures of every task as a table and as bars."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geochat.eval.benchmark import index_by_id
from geochat.eval.files import Row, read_json, read_rows
from geochat.eval.metrics import METRICS
from geochat.eval.score import Scores, cell, headline


@dataclass(frozen=True)
class Run:
    """One model's answers to a benchmark, by question_id, with their verdicts."""

    name: str
    scores: Scores
    answers: dict[str, Row]
    verdicts: dict[str, Row]

    @classmethod
    def load(cls, path: Path, name: str) -> Run:
        """A run's folder, or a scores.json alone (then without answers). ValueError names what is missing."""
        if path.is_file():
            return cls(name, _scores(path), {}, {})
        answers, samples = path / "answers.jsonl", path / "samples.jsonl"
        return cls(
            name,
            _scores(path / "scores.json"),
            index_by_id(read_rows(answers), str(answers)),
            index_by_id(read_rows(samples), str(samples)),
        )


def compare(runs: Sequence[Run]) -> list[list[str]]:
    """Each task's headline figure in every run, in percent, and what each has gained over the first, in points."""
    first = runs[0].scores
    for run in runs[1:]:
        if run.scores["benchmark"] != first["benchmark"]:
            raise ValueError(f"{run.scores['benchmark']} cannot be compared with {first['benchmark']}")
    rows = [
        [
            "task: figure (%)",
            "n",
            *(run.name for run in runs),
            *(f"{run.name} − {runs[0].name}" for run in runs[1:]),
        ]
    ]
    for name, task in first["tasks"].items():
        summaries = [run.scores["tasks"].get(name, {}).get("overall", {}) for run in runs]
        if len({summary.get("n") for summary in summaries}) > 1:
            counts = ", ".join(str(summary.get("n", 0)) for summary in summaries)
            raise ValueError(f"{name}: the runs answered different questions ({counts})")
        asked = [{k for k, v in run.verdicts.items() if v["task"] == name} for run in runs if run.verdicts]
        if any(ids != asked[0] for ids in asked):
            raise ValueError(f"{name}: the runs answered different questions (their question_ids differ)")
        values = [summary[task["headline"]] for summary in summaries]
        gains = [
            "–" if None in (value, values[0]) else f"{100 * (value - values[0]):+.2f}" for value in values[1:]
        ]
        shown = [cell(task["headline"], value) for value in values]
        rows.append([f"{name}: {task['headline']}", str(summaries[0]["n"]), *shown, *gains])
    return rows


def score_bars(runs: Sequence[Run]) -> bytes:
    """PNG of each task's headline figure per run, with its 95 % interval where there is one."""
    from matplotlib.figure import Figure

    tasks = runs[0].scores["tasks"]
    figure = Figure(figsize=(max(5.0, 1.5 + 1.15 * len(tasks)), 3.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        places = [i - 0.4 + width * (number + 0.5) for i in range(len(tasks))]
        summaries = [run.scores["tasks"][name]["overall"] for name in tasks]
        heights = [100 * (s[task["headline"]] or 0.0) for s, task in zip(summaries, tasks.values())]
        ends = [s.get("interval95") or (math.nan, math.nan) for s in summaries]  # not a number: no whisker
        error = [
            [max(0.0, h - 100 * low) for h, (low, _) in zip(heights, ends)],
            [max(0.0, 100 * high - h) for h, (_, high) in zip(heights, ends)],
        ]
        drawn = axes.bar(places, heights, width * 0.92, yerr=error, label=run.name, capsize=2, ecolor="#0008")
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    labels = [f"{name}\n{task['headline']}" for name, task in tasks.items()]
    axes.set_xticks(range(len(tasks)), labels, fontsize=8)
    axes.set(ylim=(0, 109), ylabel="%")
    axes.set_title(headline(runs[0].scores), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(
            fontsize=8, ncols=len(runs), loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False
        )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return content.getvalue()


def _scores(path: Path) -> Scores:
    scores = read_json(path)
    if not isinstance(scores, dict) or not {"benchmark", "tasks", "n"} <= scores.keys():
        raise ValueError(f"{path}: holds no scores of geochat.eval")
    for name, task in scores["tasks"].items():
        if task.get("metric") not in METRICS:
            raise ValueError(f"{path}: task {name}: unknown metric {task.get('metric')!r}")
    return scores
