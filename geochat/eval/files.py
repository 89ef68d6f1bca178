"""Writing results, and rows by their ids: no half-written file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geochat.data.rows import Row, read_rows, write_rows
from geochat.data.staged import staged

__all__ = [
    "Row",
    "index_by_id",
    "read_json",
    "read_rows",
    "with_ids",
    "write_bytes",
    "write_json",
    "write_rows",
    "write_text",
]


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write under another name first, so that a kill or a full disk leaves the previous file whole."""
    with staged(Path(path)) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode(errors="backslashreplace"))  # a lone surrogate stays valid JSON


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path}: not a JSON file") from None


def with_ids(rows: list[Row], column: str) -> list[Row]:
    """The rows with `question_id`, where they have none from another column; "" for no other."""
    return [
        row if "question_id" in row or column not in row else {**row, "question_id": row[column]}
        for row in rows
    ]


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
