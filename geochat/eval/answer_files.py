"""Answer files of several programs → rows with `question_id` and the model's words; told apart by their content.

Ours and LLaVA's have `prompt` and `text`, GeoChat's have `answer`, RSEvalKit's `query` and `pred`, XTuner's are tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geochat.eval.benchmark import Benchmark
from geochat.eval.files import Row, read_rows, with_ids
from geochat.eval.formats import number_questions, size_columns, textvqa_key
from geochat.eval.tsv import CIRCLE

_PREFIXES = ("{CLS} ", "{VQA} ", "{VG} ", "{IDK} ", "{IT} ")


def read_answers(path: Path, benchmark: Benchmark) -> list[Row]:
    """All rows of an answer file. ValueError names the file, and the row where it can."""
    rows = read_sheet(path) if path.suffix == ".xlsx" else read_rows(path)
    if rows and all("pred" in row and "question_id" not in row for row in rows):
        numbered = number_questions(_rsevalkit(row, f"{path}: row {n}") for n, row in enumerate(rows, 1))
        return [{**row, "text": _text(given["pred"])} for row, given in zip(numbered, rows)]
    if rows and all("prediction" in row and "index" in row for row in rows):
        return [_xtuner(row) for row in rows]
    if benchmark.format == "textvqa":
        return [_textvqa(row) for row in rows]
    return with_ids(rows, benchmark.id)


def answer_text(row: Row, where: str) -> str:
    """The model's words: `text` where a `prompt` stands beside it (ours, LLaVA's), else `answer` (GeoChat's)."""
    key = "answer" if "answer" in row and "prompt" not in row else "text"
    if key not in row:
        raise ValueError(f"{where}: the row has neither `answer` nor `text`")
    if row[key] is None:
        return ""  # the question could not be asked; counted as failed
    if not isinstance(row[key], str):
        raise ValueError(f"{where}: {key} must be a string, not {type(row[key]).__name__}")
    return row[key]


def read_sheet(path: Path) -> list[Row]:
    """Rows of the first sheet of an .xlsx file; its first line names the columns."""
    from openpyxl import load_workbook

    try:
        lines = list(load_workbook(path, read_only=True).worksheets[0].iter_rows(values_only=True))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # openpyxl passes on whatever its zip and XML readers raise
        raise ValueError(f"{path}: not an .xlsx file ({error})") from None
    names = [str(name) for name in lines[0]] if lines else []
    return [dict(zip(names, line)) for line in lines[1:]]


def _rsevalkit(row: Row, where: str) -> Row:
    """Truth and question stand in the row; the id is that of the data file: picture and question."""
    for key in ("filename", "query", "answer"):
        if key not in row:
            raise ValueError(f"{where} has no {key!r}")
    asked = str(row["query"])
    for prefix in _PREFIXES:
        asked = asked.removeprefix(prefix)
    return {
        "image": str(row["filename"]),
        "text": asked.strip(),
        "prompt": str(row["query"]),
        "ground_truth": str(row["answer"]),
        **size_columns(row.get("size"), where),
    }


def _xtuner(row: Row) -> Row:
    options = {letter: str(row[letter]) for letter in "ABCDE" if row.get(letter) is not None}
    index = int(row["index"])
    circle = index % CIRCLE
    columns = {key: value for key, value in row.items() if key not in ("answer", "prediction")}
    truth = {"ground_truth": row["answer"]} if row.get("answer") else {}
    said = _text(row["prediction"])
    return {
        **columns,
        **truth,
        "question_id": index,
        "circle": circle,
        "options": options,
        "prompt": "",
        "text": said,
    }


def _textvqa(row: Row) -> Row:
    """LLaVA's answers have the picture as their id; ours have picture and question already."""
    key = str(row.get("question_id"))
    return (
        row if ": " in key or "prompt" not in row else {**row, "question_id": textvqa_key(key, row["prompt"])}
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
