"""Two runs on the same questions: what the second has gained, how sure that is, and which answers have changed.

    python -m geochat.eval.compare RUN_A RUN_B [--names base fine-tuned]

A run is a folder of `geochat.eval.run` or of `geochat.eval.score --output`. Only questions in both count; the others
are named. Right and wrong answers are compared by McNemar's exact test, graded ones by a paired bootstrap; the interval
of the gain draws questions about one picture together.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geochat.errors import stop
from geochat.eval.benchmark import index_by_id
from geochat.eval.files import Row, read_json, read_rows
from geochat.eval.intervals import figure_of, grades, interval, mcnemar, paired, sums
from geochat.eval.metrics import METRICS
from geochat.eval.score import Scores, cell, markdown


@dataclass(frozen=True)
class Run:
    """One model's verdicts by question_id, and its answers where they lie beside them."""

    name: str
    scores: Scores
    answers: dict[str, Row]
    verdicts: dict[str, Row]

    @classmethod
    def load(cls, path: Path, name: str) -> Run:
        """From the folder, or from a file in it. ValueError names what is missing."""
        folder = path.parent if path.is_file() else path
        answers, samples = folder / "answers.jsonl", folder / "samples.jsonl"
        return cls(
            name,
            _scores(folder / "scores.json"),
            index_by_id(read_rows(answers), str(answers)) if answers.exists() else {},
            index_by_id(read_rows(samples), str(samples)),
        )

    def picture(self, key: str) -> str:
        """Equal for questions about one picture; the question itself where the answers do not name pictures."""
        row = self.answers.get(key, {})
        return str(row.get("picture") or row.get("image") or row.get("image_id") or f"question {key}")

    def of_task(self, task: str) -> dict[str, Row]:
        return {key: verdict for key, verdict in self.verdicts.items() if verdict["task"] == task}

    def sums(self, task: str, keys: Sequence[str]) -> np.ndarray:
        """Of the task's headline figure over these questions; see geochat.eval.intervals."""
        return sums([self.verdicts[key] for key in keys], self.scores["tasks"][task]["headline"])

    def interval(self, task: str, keys: Sequence[str], value: float | None) -> tuple[float, float] | None:
        """95 % of the task's headline figure, which is `value` over these questions. None for a figure that is no
        ratio of sums over questions."""
        parts = self.sums(task, keys)
        if value is None or not math.isclose(float(figure_of(parts.sum(axis=0))), value, rel_tol=1e-6):
            return None
        return interval(parts, [self.picture(key) for key in keys])


@dataclass(frozen=True)
class Pair:
    """One task of two runs, over the questions that both have answered."""

    task: str
    figure: str
    n: int
    values: tuple[float | None, float | None]
    interval: tuple[float, float] | None  # of the gain
    p: float | None
    test: str
    better: list[str]  # question_ids
    worse: list[str]


def pair(first: Run, second: Run) -> list[Pair]:
    """Every task of both. ValueError when the runs are of different benchmarks, were scored in different ways, or share
    no question."""
    names = [run.scores["benchmark"] for run in (first, second)]
    if names[0] != names[1]:
        raise ValueError(f"{names[1]} cannot be compared with {names[0]}")
    found = []
    for task, scores in first.scores["tasks"].items():
        common = [key for key in first.of_task(task) if second.verdicts.get(key, {}).get("task") == task]
        if common:
            ways = [(run.scores["tasks"][task]["metric"], run.scores.get("iou")) for run in (first, second)]
            if ways[0] != ways[1]:
                raise ValueError(f"{task} was scored in different ways: {ways[0]} and {ways[1]}")
            found.append(_pair(first, second, task, scores["headline"], common))
    if not found:
        raise ValueError(f"{first.name} and {second.name} have no question in common")
    return found


def _pair(first: Run, second: Run, task: str, figure: str, keys: list[str]) -> Pair:
    parts = [run.sums(task, keys) for run in (first, second)]
    gain, p = paired(parts[0], parts[1], [first.picture(key) for key in keys])
    graded = [grades(one, figure) for one in parts]
    better = [key for key, was, now in zip(keys, *graded, strict=True) if now > was]
    worse = [key for key, was, now in zip(keys, *graded, strict=True) if now < was]
    test = "bootstrap"
    if figure == "accuracy":
        p, test = mcnemar(len(worse), len(better)), "McNemar"
    summarise = METRICS[first.scores["tasks"][task]["metric"]].summarise
    a, b = (summarise([run.verdicts[key] for key in keys])[figure] for run in (first, second))
    return Pair(task, figure, len(keys), (a, b), gain, p, test, better, worse)


def only_in(run: Run, other: Run) -> list[str]:
    return [key for key in run.verdicts if key not in other.verdicts]


def table(pairs: Sequence[Pair], names: Sequence[str]) -> list[list[str]]:
    """Figures in percent, gains in points; heading first."""
    rows = [["task: figure (%)", "n", *names, "gain", "95 % of the gain", "better", "worse", "p", "test"]]
    for one in pairs:
        a, b = one.values
        rows.append(
            [
                f"{one.task}: {one.figure}",
                str(one.n),
                cell(one.figure, a),
                cell(one.figure, b),
                "–" if a is None or b is None else f"{100 * (b - a):+.2f}",
                "–"
                if one.interval is None
                else f"{100 * one.interval[0]:+.1f} to {100 * one.interval[1]:+.1f}",
                str(len(one.better)),
                str(len(one.worse)),
                "–" if one.p is None else f"{one.p:.2g}",
                one.test,
            ]
        )
    return rows


def missing_in_one(first: Run, second: Run) -> list[str]:
    """A line for each run that has questions which the other has not."""
    lines = []
    for run, other in ((first, second), (second, first)):
        if keys := only_in(run, other):
            lines.append(f"only in {run.name} ({len(keys)}): {', '.join(keys)}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m geochat.eval.compare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="folder of a scored run")
    parser.add_argument("--names", nargs=2, help="what to call the runs; default: the folders' names")
    arguments = parser.parse_args(argv)
    names = arguments.names or [path.resolve().name for path in arguments.runs]
    try:
        first, second = (Run.load(path, name) for path, name in zip(arguments.runs, names, strict=True))
        pairs = pair(first, second)
    except (ValueError, OSError) as error:
        stop(error)
    print(markdown(table(pairs, names)))
    for line in missing_in_one(first, second):
        print(line)
    for one in pairs:
        for word, keys in (("better", one.better), ("worse", one.worse)):
            if keys:
                print(f"{one.task}, {word} in {second.name} ({len(keys)}): {', '.join(keys)}")


def _scores(path: Path) -> Scores:
    scores = read_json(path)
    if not isinstance(scores, dict) or not {"benchmark", "tasks", "n"} <= scores.keys():
        raise ValueError(f"{path}: holds no scores of geochat.eval")
    for name, task in scores["tasks"].items():
        if task.get("metric") not in METRICS:
            raise ValueError(f"{path}: task {name}: unknown metric {task.get('metric')!r}")
    return scores


if __name__ == "__main__":
    main()
