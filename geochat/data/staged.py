"""Writing a file under a temporary name: a reader sees all of it or none, and a kill leaves the previous one whole."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = re.compile(r"\.\d+-\d+\.partial")
_numbers = itertools.count()


@contextmanager
def staged(path: Path, within: Path | None = None) -> Iterator[Path]:
    """A name to write to, in the folder `within` (default: beside `path`); it becomes `path` when the block ends.

    When the block fails, nothing is left of it. `within` must lie on the same file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, whatever the length of the final name: file systems end at 255 bytes.
    temporary = (within or path.parent) / f".{os.getpid()}-{next(_numbers)}.partial"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_partials(folder: Path) -> None:
    """Delete what a killed process left in `folder`. No other process may be writing there."""
    for entry in os.scandir(folder):
        if _PARTIAL.fullmatch(entry.name):
            Path(entry.path).unlink(missing_ok=True)


def write_records(path: Path, records: Iterable[Any]) -> None:
    """A JSON array with one record on each line, so that line n holds row n - 2."""
    with staged(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, record in enumerate(records):
            file.write((",\n" if number else "\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")
