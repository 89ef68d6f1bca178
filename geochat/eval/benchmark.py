"""A benchmark is data: one short TOML file says which questions, which prompt, which metric, which strata.

    name = "referring"
    questions = "referring.jsonl"          # JSON Lines, one question per row; `format` names other layouts
    image_folder = "images"
    image = "{image_id}.png"               # format strings may use any column of the row; default "{image}"
    max_new_tokens = 256
    strata = ["size_group", "type"]        # columns by which the scores are also given; the first is the macro's

    [prompt]                               # prompt, metric, truth and image_size: one value, or one per value of a column
    column = "type"
    ref = "[refer] Give me the location of <p> {question} </p>"
    grounding = "[grounding]{question}"

    [columns]                              # columns derived by a regular expression from another one
    class = { from = "question_id", pattern = "^([^/]+)/" }

    [only]                                 # rows kept; the others are counted as excluded
    category = ["presence", "comp"]

    [expected]                             # what the published subset holds, to compare with
    questions = 7593
    counts.type = { ref = 7033, grounding = 560 }

Relative paths start at the TOML's folder; for the benchmarks that ship with the package, at $GEOCHAT_BENCHMARKS or else
at `playground/data/eval`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from geochat.eval.catalogue import BUILT_IN, find, known
from geochat.eval.choice import Choice
from geochat.eval.files import Row, index_by_id, with_ids
from geochat.eval.formats import FORMATS
from geochat.eval.metrics import METRICS

__all__ = ["BUILT_IN", "Benchmark", "Choice", "index_by_id", "known"]


@dataclass(frozen=True)
class Benchmark:
    name: str
    metric: Choice
    folder: str = ""
    """Where its files lie below the root: relative paths start there."""
    questions: str = "questions.jsonl"
    format: str = "rows"
    """Layout of the question file: a name in `geochat.eval.formats`."""
    files: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Further files that the format reads, by their role; their paths start at the question file's folder."""
    id: str = ""
    """Column that tells questions apart where there is no `question_id`."""
    image_folder: str = "images"
    image: str = "{image}"
    prompt: Choice = field(default_factory=lambda: Choice("{text}"))
    truth: Choice = field(default_factory=lambda: Choice("ground_truth"))
    """Name of the column that holds the truth."""
    image_size: Choice = field(default_factory=Choice)
    """[width, height] in pixels where the rows do not carry `width` and `height`; boxes only."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    only: Mapping[str, list] = field(default_factory=dict)
    strata: tuple[str, ...] = ()
    labels_by: str = ""
    """Column within whose values the truths are each other's alternatives (yes/no, rural/urban); "" for all alike."""
    max_new_tokens: int = 256
    description: str = ""
    source: str = ""
    """Where questions and pictures are published."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Of the published subset: `questions`, `ids` (hash, see geochat.eval.checks), `counts.COLUMN` = {value = number}."""
    scorers: Mapping[str, str] = field(default_factory=dict)
    """Metrics that score as another program did, by its name."""
    submission: str = ""
    """File that the benchmark's server takes: a name in `geochat.eval.submit`."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Published figures, by model."""
    root: Path = Path()
    """Where relative paths start; not a key of the file."""

    @classmethod
    def load(cls, name: str | Path) -> Benchmark:
        """A benchmark by its name (those that ship with the package) or by its TOML file. ValueError if unfit."""
        return cls.parse(*find(name))

    @classmethod
    def parse(cls, data: Mapping[str, Any], root: Path, where: str) -> Benchmark:
        keys = {f.name for f in fields(cls)} - {"root"}
        if unknown := sorted(data.keys() - keys):
            raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(keys))}")
        if missing := sorted({"name", "metric"} - data.keys()):
            raise ValueError(f"{where}: the key {' and '.join(missing)} is missing")
        values = dict(data)
        for key, kind in _KINDS.items():
            if key in values and not isinstance(values[key], kind):
                raise ValueError(f"{where}: {key} must be a {_TOML_NAMES[kind]}")
        for key in ("metric", "prompt", "truth", "image_size"):
            if key in values:
                values[key] = Choice.parse(values[key], f"{where}: {key}")
        benchmark = cls(
            **values | {"strata": tuple(values.get("strata", ())), "root": root / values.get("folder", "")}
        )
        benchmark._check(where)
        return benchmark

    def _check(self, where: str) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"{where}: unknown format {self.format!r}; known: {', '.join(FORMATS)}")
        for column, allowed in self.only.items():
            if not isinstance(allowed, list):
                raise ValueError(f"{where}: only.{column} must be a list of values")
        for column in self.truth.values():
            if column in ("text", "answer"):
                raise ValueError(
                    f"{where}: truth = {column!r}: beside an answer that name means the model's own words; "
                    "rename the column in the question file"
                )
        for metric in [*self.metric.values(), *self.scorers.values()]:
            if metric not in METRICS:
                raise ValueError(f"{where}: unknown metric {metric!r}; known: {', '.join(METRICS)}")
        for column, rule in self.columns.items():
            _check_column(column, rule, where)

    def read_questions(self, path: str | Path | None = None) -> list[Row]:
        """All rows of the question file, before `only`; every one has its own `question_id`."""
        source = Path(path) if path else self.root / self.questions
        rows = with_ids(FORMATS[self.format](source, self.beside(source)), self.id)
        index_by_id(rows, str(source))
        return rows

    def beside(self, questions: Path) -> dict[str, list[Path]]:
        """The further files, by role."""
        return {
            role: [questions.parent / name for name in ([names] if isinstance(names, str) else names)]
            for role, names in self.files.items()
        }

    def prepare(self, row: Row, where: str) -> Row | None:
        """The row with its derived columns; None when `only` leaves it out."""
        for column, allowed in self.only.items():
            if column not in row:
                raise ValueError(f"{where}: the row has no column {column!r}")
            if row[column] not in allowed:
                return None
        if not self.columns:
            return row
        derived = {}
        for column, rule in self.columns.items():
            if rule["from"] not in row:
                raise ValueError(f"{where}: the row has no column {rule['from']!r}")
            if not (match := re.search(rule["pattern"], str(row[rule["from"]]))):
                raise ValueError(
                    f"{where}: {rule['from']} is {row[rule['from']]!r}, not like {rule['pattern']}"
                )
            derived[column] = match.group(1)
        return row | derived

    def prompt_of(self, row: Row, where: str) -> str:
        return _fill(self.prompt.of(row, where), row, where)

    def image_of(self, row: Row, where: str) -> str:
        """Path of the picture below the image folder; "" for a question without one."""
        return _fill(self.image, row, where)


_KINDS: dict[str, type] = {
    **dict.fromkeys(("name", "folder", "questions", "format", "id", "image_folder", "image"), str),
    **dict.fromkeys(("labels_by", "description", "source", "submission"), str),
    **dict.fromkeys(("only", "columns", "files", "expected", "scorers", "published"), dict),
    "strata": list,
    "max_new_tokens": int,
}
_TOML_NAMES: dict[type, str] = {str: "string", list: "list", dict: "table", int: "number"}


def _check_column(column: str, rule: Any, where: str) -> None:
    if not isinstance(rule, dict) or rule.keys() != {"from", "pattern"}:
        raise ValueError(f'{where}: columns.{column} must be {{ from = "column", pattern = "…(…)…" }}')
    try:
        groups = re.compile(rule["pattern"]).groups
    except re.error as error:
        raise ValueError(f"{where}: columns.{column}: {error}") from None
    if groups != 1:
        raise ValueError(f"{where}: columns.{column}: the pattern needs exactly one (group)")


def _fill(pattern: str, row: Row, where: str) -> str:
    try:
        return pattern.format_map(row)
    except KeyError as error:
        raise ValueError(f"{where}: the row has no column {error} for {pattern!r}") from None
