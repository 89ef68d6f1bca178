"""Reading rows and writing results: line-numbered errors, no half-written file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geochat.data.staged import staged

Row = dict[str, Any]


def read_rows(path: str | Path, torn_end: bool = False) -> list[Row]:
    """Rows of a JSON Lines file, or of a JSON array. ValueError names the file and the line.

    `torn_end`: drop what follows the last newline, which a kill may have cut off.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace" if torn_end else "strict")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if torn_end:
        text = text[: text.rfind("\n") + 1]
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a row must be an object, not {type(row).__name__}")
    return [row for _, row in numbered]


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write under another name first, so that a kill or a full disk leaves the previous file whole."""
    with staged(Path(path)) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode(errors="backslashreplace"))  # a lone surrogate stays valid JSON


def write_rows(path: str | Path, rows: list[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
