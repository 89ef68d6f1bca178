"""An instruction file as a sequence of records, without loading it.

The byte range of every record is found once (`scan`) and kept in a small index beside the file, which later runs map
into memory. A record is read from the file when it is asked for: what stays in memory is the system's page cache,
which all worker processes share, and nothing on the heap.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from geochat.data.scan import ScanError, scan

_VERSION = 1
_HEADER = 2  # rows of the index before the ranges: (version, file size), (modification time in ns, rows)


class InstructionStore:
    """The records of a JSON array or a JSON Lines file, by number; picklable, and safe to use after a fork."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            ValueError: the file is missing, or neither a JSON array nor JSON Lines; the row is named.
        """
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be opened: {error.strerror}") from None
        index = _load_index(self.path)
        self._ranges = _build_index(self.path) if index is None else index

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, row: int) -> Any:
        """The parsed record; ValueError names file and row when it is no valid JSON."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, no row {row}")
        row %= len(self)
        try:
            return json.loads(self.text(row))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(row)}: not valid JSON: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def text(self, row: int) -> str:
        """The record as it stands in the file; UnicodeDecodeError when that is not UTF-8."""
        start, end = (int(offset) for offset in self._ranges[row])
        # Reading at an offset, instead of mapping the file, leaves pages uncounted in the process's memory and needs
        # no position, which forked workers would share.
        return os.pread(self._file.fileno(), end - start, start).decode()

    def where(self, row: int) -> str:
        """How messages name a record: the file and the row, counted from 0."""
        return f"{self.path}:row {row}"

    def __reduce__(self) -> tuple[type[InstructionStore], tuple[Path]]:
        return type(self), (self.path,)


def index_paths(path: Path) -> list[Path]:
    """Where the index of a file may lie: beside it, or in the user's cache when that folder cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return [path.with_name(f".{path.name}.index"), cache / "geochat" / f"{path.stem}-{digest}.index"]


def _stamp(path: Path, rows: int) -> list[list[int]]:
    stat = path.stat()
    return [[_VERSION, stat.st_size], [stat.st_mtime_ns, rows]]


def _load_index(path: Path) -> np.ndarray | None:
    """Byte ranges [n, 2] mapped from an index that belongs to the file as it is now."""
    for file in index_paths(path):
        try:
            index = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            continue
        if index.ndim == 2 and index.shape[1] == 2 and len(index) >= _HEADER:
            ranges = index[_HEADER:]
            if index[:_HEADER].tolist() == _stamp(path, len(ranges)):
                return ranges
    return None


def _build_index(path: Path) -> np.ndarray:
    stamp = _stamp(path, 0)
    try:
        ranges = scan(path)
    except ScanError as error:
        raise ValueError(_first_fault(path, error)) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    stamp[1][1] = len(ranges)
    index = np.concatenate([np.array(stamp, dtype=np.int64), ranges])
    for file in index_paths(path):
        if _write(file, index):
            mapped = _load_index(path)
            return ranges if mapped is None else mapped
    return ranges


def _write(file: Path, index: np.ndarray) -> bool:
    """Whether the index could be written; a reader sees all of it or none."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.save(stream, index)
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def _first_fault(path: Path, error: ScanError) -> str:
    """Name the row that broke the file: the first that does not parse, or the one after the last."""
    rows = error.rows.tolist()
    with path.open("rb") as file:
        for row, (start, end) in enumerate(rows):
            file.seek(start)
            try:
                json.loads(file.read(end - start).decode())
            except ValueError as fault:
                return f"{path}:row {row}: not valid JSON: {fault}"
    return f"{path}:row {len(rows)}: {error}" if rows else f"{path}: {error}"
