"""Rows of results: read from JSON Lines or a JSON array with line-numbered errors, written as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

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


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """JSON Lines; the file appears when it is complete."""
    with staged(Path(path)) as unfinished, open_rows(unfinished, "w") as file:
        file.writelines(map(row_line, rows))


def open_rows(path: Path, mode: str) -> IO[str]:
    """A file for the lines of `row_line`; a lone surrogate in a model's words stays valid JSON."""
    return path.open(mode, encoding="utf-8", errors="backslashreplace")


def row_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
