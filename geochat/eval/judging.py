"""From answered rows to verdicts, and from verdicts to the scores of a benchmark. Pure: no files, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geochat.eval.answer_files import answer_text
from geochat.eval.benchmark import Benchmark, index_by_id
from geochat.eval.captions import meteor_variant
from geochat.eval.files import Row
from geochat.eval.labels import bare
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import IouMode, Question, Summary

Scores = dict[str, Any]


def join(answers: list[Row], questions: list[Row], source: str) -> list[Row]:
    """One row per question with the columns of both; the question's win but for the words of the answer."""
    given = index_by_id(answers, source)
    asked = index_by_id(questions, "questions")
    if strangers := [key for key in given if key not in asked]:
        raise ValueError(
            f"{source}: {len(strangers)} answers belong to no question, the first is {strangers[0]!r}: "
            "is this the question file they were made from?"
        )
    rows = []
    for key, question in asked.items():
        words = answer_text(given[key], f"{source}: {key}") if key in given else None
        columns = {name: value for name, value in question.items() if name not in ("text", "answer")}
        prompt = question.get("text", "")
        rows.append({"prompt": prompt, **given.get(key, {}), **columns, "text": words})
    return rows


@dataclass(frozen=True)
class _Answered:
    """A row that counts, with what the benchmark says of it."""

    row: Row
    where: str
    task: str
    metric: str
    truth: Any
    group: str
    """Task and value of `labels_by`: within it, truths are each other's alternatives."""


def judge(
    rows: list[Row],
    benchmark: Benchmark,
    iou: IouMode = "rotated",
    source: str = "answers",
    instead: Mapping[str, str] | None = None,
) -> list[Row]:
    """One verdict per row that counts: question_id, task, metric, strata and the metric's own fields.

    `instead`: metrics to use in place of others; the key "" stands for all.
    """
    index_by_id(rows, source)
    counted = [answered for row in rows if (answered := _answered(row, benchmark, source)) is not None]
    labels: dict[str, set[str]] = {}
    for one in counted:
        labels.setdefault(one.group, set()).update(map(bare, METRICS[one.metric].labels_of(one.truth)))
    frozen = {group: frozenset(names) for group, names in labels.items()}
    instead = instead or {}
    judged = []
    for one in counted:
        metric = instead.get(one.metric) or instead.get("") or one.metric
        size = _size(benchmark, one.row, one.where)
        question = Question(one.truth, size, frozen[one.group], iou, one.row)
        try:
            verdict = METRICS[metric].judge(answer_text(one.row, one.where), question)
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from None
        strata = verdict.pop("strata", {}) | {s: one.row[s] for s in benchmark.strata if s in one.row}
        identity = {"question_id": one.row["question_id"], "task": one.task, "metric": metric}
        judged.append({**identity, **strata, **verdict})
    return judged


def _answered(given: Row, benchmark: Benchmark, source: str) -> _Answered | None:
    """None for a row that the benchmark leaves out."""
    where = f"{source}: question {given['question_id']}"
    if (row := benchmark.prepare(given, where)) is None:
        return None
    task = str(row[benchmark.metric.column]) if benchmark.metric.column in row else benchmark.name
    metric, column = benchmark.metric.of(row, where), benchmark.truth.of(row, where)
    truth = row.get(column)
    if truth is None and METRICS[metric].needs_truth:
        raise ValueError(f"{where}: no truth in column {column!r}; give the question file with --questions")
    return _Answered(row, where, task, metric, truth, f"{task}/{row.get(benchmark.labels_by, '')}")


def summarise(judged: list[Row], benchmark: Benchmark, *, total: int, iou: IouMode = "rotated") -> Scores:
    """Scores as one JSON value: `tasks[name]` → metric, headline, overall (micro), macro, strata[column][value]."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in judged):
        verdicts = [row for row in judged if row["task"] == task]
        metric = METRICS[verdicts[0]["metric"]]
        strata = {
            column: {value: metric.summarise(group) for value, group in sorted(groups.items())}
            for column in benchmark.strata
            if (groups := _grouped(verdicts, column))
        }
        tasks[task] = {
            "metric": verdicts[0]["metric"],
            "headline": metric.headline,
            "overall": metric.summarise(verdicts),
            "macro": _macro(strata, metric.headline),
            "strata": strata,
        }
    scores: Scores = {
        "benchmark": benchmark.name,
        "n": len(judged),
        "excluded": total - len(judged),
        "tasks": tasks,
    }
    if any(task["metric"] == "boxes" for task in tasks.values()):
        scores["iou"] = iou
    if any("meteor" in task["overall"] for task in tasks.values()):
        scores["meteor"] = meteor_variant()
    return scores


def _grouped(verdicts: Sequence[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for verdict in verdicts:
        if column in verdict:
            groups.setdefault(str(verdict[column]), []).append(verdict)
    return groups


def _size(benchmark: Benchmark, row: Row, where: str) -> tuple[int, int] | None:
    if "width" in row and "height" in row:
        return int(row["width"]), int(row["height"])
    size = benchmark.image_size.of(row, where)
    return (int(size[0]), int(size[1])) if size else None


def _macro(strata: dict[str, dict[str, Summary]], headline: str) -> Summary:
    """Means over the groups of the first stratum, of every share that all of them have."""
    over, groups = next(iter(strata.items()), ("", {}))
    if len(groups) < 2:
        return {}
    keys = [key for key, value in next(iter(groups.values())).items() if isinstance(value, float)]
    keys = [key for key in keys if all(group.get(key) is not None for group in groups.values())]
    return {"over": over, "groups": len(groups)} | {
        key: sum(group[key] for group in groups.values()) / len(groups) for key in keys
    }
