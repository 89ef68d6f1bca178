"""Reading rows and writing results: no half-written file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geochat.data.rows import Row, read_rows
from geochat.data.staged import staged

__all__ = ["Row", "read_json", "read_rows", "write_bytes", "write_json", "write_rows", "write_text"]


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
