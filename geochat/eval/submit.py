"""Write the file that a benchmark's server takes.

    python -m geochat.eval.submit ANSWERS.jsonl --benchmark vqav2 --output vqav2.json

The layouts are those of LLaVA's and XTuner's converters; `--layout xtuner` writes XTuner's table for MMBench.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geochat.data.staged import staged
from geochat.errors import stop
from geochat.eval.answer_files import answer_text, read_answers
from geochat.eval.benchmark import Benchmark, index_by_id
from geochat.eval.evalai import normalise
from geochat.eval.files import Row, read_rows, write_text
from geochat.eval.tsv import read_table

Answers = dict[str, str]
"""The model's words by question_id."""

_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns of the table that MMBench's server does not want; those that there are."""


def vqav2(answers: Answers, benchmark: Benchmark, questions: Path) -> list[Row]:
    """Every question of the whole test set, with an empty answer where it was not asked."""
    every = read_rows(questions.parent / str(benchmark.files["all"]))
    return [
        {"question_id": row["question_id"], "answer": normalise(answers.get(str(row["question_id"]), ""))}
        for row in every
    ]


def gqa(answers: Answers, benchmark: Benchmark, questions: Path) -> list[Row]:
    return [{"questionId": key, "prediction": text.lower().rstrip(".")} for key, text in answers.items()]


def vizwiz(answers: Answers, benchmark: Benchmark, questions: Path) -> list[Row]:
    asked = index_by_id(benchmark.read_questions(questions), str(questions))
    return [{"image": row["image"], "answer": normalise(answers[key])} for key, row in asked.items()]


def mmbench(answers: Answers, benchmark: Benchmark, questions: Path) -> list[Row]:
    """The table without some columns, the answer as its seventh; for MMBench's server."""
    rows = []
    for row in read_table(questions):
        cells = [(name, _cell(name, value)) for name, value in row.items() if name not in _LEFT_OUT]
        rows.append(dict(cells[:6]) | {"prediction": answers[row["index"]]} | dict(cells[6:]))
    return rows


def xtuner(answers: Answers, benchmark: Benchmark, questions: Path) -> list[Row]:
    """XTuner's `mmbench_result.xlsx`, in the order of `index`."""
    rows = []
    for row in sorted(read_table(questions), key=lambda row: int(row["index"])):
        line: Row = {"question": row["question"]}
        line |= {letter: row[letter] for letter in "ABCDE" if row.get(letter)}
        line["prediction"] = answers[row["index"]]
        line |= {name: row[name] for name in ("category", "l2-category") if name in row}
        answer = row.get("answer")
        split = row.get("split") or ("dev" if answer else "test")
        rows.append(line | {"index": int(row["index"]), "split": split, "answer": answer})
    return rows


LAYOUTS: dict[str, Callable[[Answers, Benchmark, Path], list[Row]]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "mmbench": mmbench,
    "xtuner": xtuner,
}
_TABLES = ("mmbench", "xtuner")


def write_submission(
    rows: list[Row], answers_file: Path, benchmark: Benchmark, output: Path, layout: str, questions: Path
) -> int:
    """Write `output`; the number of its rows. ValueError when a question has no answer, or an answer no question."""
    answers = {
        key: answer_text(row, f"{answers_file}: question {key}")
        for key, row in index_by_id(rows, str(answers_file)).items()
    }
    asked = index_by_id(benchmark.read_questions(questions), str(questions))
    if missing := [key for key in asked if key not in answers]:
        raise ValueError(
            f"{answers_file}: {len(missing)} of {len(asked)} questions have no answer, the first is {missing[0]}"
        )
    written = LAYOUTS[layout](answers, benchmark, questions)
    if layout in _TABLES:
        _write_sheet(written, output)
    else:
        write_text(output, json.dumps(written))
    return len(written)


def _cell(name: str, value: str) -> str | int | None:
    return int(value) if name == "index" else value or None


def _write_sheet(rows: list[Row], output: Path) -> None:
    from openpyxl import Workbook
    from openpyxl.utils.exceptions import IllegalCharacterError

    columns = list(dict.fromkeys(name for row in rows for name in row))
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(columns)
    for row in rows:
        try:
            sheet.append([row.get(name) for name in columns])
        except IllegalCharacterError:
            raise ValueError(f"index {row['index']}: an .xlsx file cannot hold control characters") from None
    with staged(output) as unfinished:
        book.save(unfinished)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.submit", description=__doc__.split("\n")[0])
    parser.add_argument(
        "answers", type=Path, help="answers.jsonl of geochat.eval.run, or LLaVA's answer file"
    )
    parser.add_argument("--benchmark", required=True, help="name of a benchmark or a .toml file")
    parser.add_argument(
        "--output", type=Path, required=True, help="the file to hand in: .json, or .xlsx for MMBench"
    )
    parser.add_argument("--questions", type=Path, help="question file, where not where the benchmark says")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: the benchmark's")
    arguments = parser.parse_args(argv)
    try:
        benchmark = Benchmark.load(arguments.benchmark)
        layout: Any = arguments.layout or benchmark.submission
        if layout not in LAYOUTS:
            raise ValueError(
                f"{benchmark.name} has no file to hand in; --layout names one: {', '.join(LAYOUTS)}"
            )
        rows = read_answers(arguments.answers, benchmark)
        questions = arguments.questions or benchmark.root / benchmark.questions
        count = write_submission(rows, arguments.answers, benchmark, arguments.output, layout, questions)
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    print(f"{arguments.output}: {count} answers")


if __name__ == "__main__":
    main()
