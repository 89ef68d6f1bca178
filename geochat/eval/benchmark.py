"""A benchmark is data: one short TOML file says which questions, which prompt, which metric, which strata.

    name = "referring"
    questions = "referring.jsonl"          # JSON Lines, one question per row; relative to the TOML's root (below)
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

Relative paths start at the TOML's folder; for the benchmarks that ship with the package, at $GEOCHAT_BENCHMARKS or else
at `playground/data/eval`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from geochat.eval.files import Row, read_rows
from geochat.eval.metrics import METRICS

BUILT_IN = Path(__file__).parent / "benchmarks"


@dataclass(frozen=True)
class Choice:
    """One value for every row, or one for each value of a column (`default` for the values not listed)."""

    default: Any = None
    column: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, where: str) -> Choice:
        if not isinstance(value, dict):
            return cls(value)
        table = dict(value)
        column = table.pop("column", None)
        if not isinstance(column, str):
            raise ValueError(f'{where}: a table needs `column = "…"`, the column it is chosen by')
        return cls(table.pop("default", None), column, table)

    def of(self, row: Row, where: str) -> Any:
        if not self.column:
            return self.default
        if self.column not in row:
            raise ValueError(f"{where}: the row has no column {self.column!r}")
        value = self.table.get(str(row[self.column]), self.default)
        if value is None:
            raise ValueError(
                f"{where}: {self.column} is {row[self.column]!r}; known: {', '.join(sorted(self.table))}"
            )
        return value

    def values(self) -> list[Any]:
        return [value for value in (self.default, *self.table.values()) if value is not None]


@dataclass(frozen=True)
class Benchmark:
    name: str
    metric: Choice
    questions: str = "questions.jsonl"
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
    root: Path = Path()
    """Where relative paths start; not a key of the file."""

    @classmethod
    def load(cls, name: str | Path) -> Benchmark:
        """A benchmark by its name (those that ship with the package) or by its TOML file. ValueError if unfit."""
        path = Path(name)
        root = path.parent
        if path.suffix != ".toml":
            path = BUILT_IN / f"{name}.toml"
            root = Path(os.environ.get("GEOCHAT_BENCHMARKS", "playground/data/eval"))
            if not path.is_file():
                raise ValueError(f"no benchmark {str(name)!r}; known: {', '.join(known())}, or a .toml file")
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not TOML ({error})") from None
        return cls.parse(data, root, str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], root: Path, where: str) -> Benchmark:
        keys = {f.name for f in fields(cls)} - {"root"}
        if unknown := sorted(data.keys() - keys):
            raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(keys))}")
        if missing := sorted({"name", "metric"} - data.keys()):
            raise ValueError(f"{where}: the key {' and '.join(missing)} is missing")
        values = dict(data)
        for key in ("metric", "prompt", "truth", "image_size"):
            if key in values:
                values[key] = Choice.parse(values[key], f"{where}: {key}")
        for key in ("name", "questions", "image_folder", "image", "labels_by", "description"):
            if not isinstance(values.get(key, ""), str):
                raise ValueError(f"{where}: {key} must be a string")
        for key, kind in (("strata", list), ("only", dict), ("columns", dict), ("max_new_tokens", int)):
            if key in values and not isinstance(values[key], kind):
                raise ValueError(f"{where}: {key} must be a {_TOML_NAMES[kind]}")
        for column, allowed in values.get("only", {}).items():
            if not isinstance(allowed, list):
                raise ValueError(f"{where}: only.{column} must be a list of values")
        for column in values["truth"].values() if "truth" in values else ():
            if column in ("text", "answer"):
                raise ValueError(
                    f"{where}: truth = {column!r}: beside an answer that name means the model's own words; "
                    "rename the column in the question file"
                )
        for metric in values["metric"].values():
            if metric not in METRICS:
                raise ValueError(f"{where}: unknown metric {metric!r}; known: {', '.join(METRICS)}")
        for column, rule in values.get("columns", {}).items():
            if not isinstance(rule, dict) or rule.keys() != {"from", "pattern"}:
                raise ValueError(
                    f'{where}: columns.{column} must be {{ from = "column", pattern = "…(…)…" }}'
                )
            try:
                groups = re.compile(rule["pattern"]).groups
            except re.error as error:
                raise ValueError(f"{where}: columns.{column}: {error}") from None
            if groups != 1:
                raise ValueError(f"{where}: columns.{column}: the pattern needs exactly one (group)")
        values["strata"] = tuple(values.get("strata", ()))
        return cls(**values, root=root)

    def read_questions(self, path: str | Path | None = None) -> list[Row]:
        """All rows of the question file, before `only`; every one has its own `question_id`."""
        source = Path(path) if path else self.root / self.questions
        rows = read_rows(source)
        index_by_id(rows, str(source))
        return rows

    def prepare(self, row: Row, where: str) -> Row | None:
        """The row with its derived columns; None when `only` leaves it out."""
        for column, allowed in self.only.items():
            if column not in row:
                raise ValueError(f"{where}: the row has no column {column!r}")
            if row[column] not in allowed:
                return None
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
        return _fill(self.image, row, where)


_TOML_NAMES: dict[type, str] = {list: "list", dict: "table", int: "number"}


def known() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def index_by_id(rows: list[Row], source: str) -> dict[str, Row]:
    """Rows by `question_id` as text. ValueError when an id is missing or occurs twice."""
    index: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        if row.get("question_id") is None:
            raise ValueError(f"{source}: row {number} has no question_id")
        key = str(row["question_id"])
        if key in index:
            raise ValueError(f"{source}: row {number}: question_id {key!r} occurs twice")
        index[key] = row
    return index


def _fill(pattern: str, row: Row, where: str) -> str:
    try:
        return pattern.format_map(row)
    except KeyError as error:
        raise ValueError(f"{where}: the row has no column {error} for {pattern!r}") from None
