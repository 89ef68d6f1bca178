"""Where the records of a JSON file begin and end, found without parsing them.

Right for every valid JSON array, with any layout, and for every JSON Lines file; the caller parses the records.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from geochat.data.json_marks import SPACES, RecordMarks

BLOCK = 1 << 19
"""Bytes looked at together, a multiple of 64: small enough to stay in the processor's cache."""

_NEWLINE = 0x0A
_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|,|[^\s,"]+|"', re.DOTALL)


class ScanError(ValueError):
    """A file whose structure is broken; `rows` holds the records found before."""

    def __init__(self, reason: str, rows: np.ndarray) -> None:
        super().__init__(reason)
        self.rows = rows


def scan(path: Path) -> np.ndarray:
    """Byte ranges [n, 2] int64 of the records of a JSON array or a JSON Lines file, without the space around them.

    Raises:
        ScanError: the file is neither, or breaks off.
    """
    with path.open("rb") as file:
        start, first = _first_byte(file)
        if first == b"[":
            return _scan_array(file, start)
        if first == b"{":
            return _scan_lines(file, start)
    reason = (
        "the file is empty" if not first else f"begins with {first!r}; expected [ (JSON) or {{ (JSON Lines)"
    )
    raise ScanError(reason, _no_rows())


def _no_rows() -> np.ndarray:
    return np.empty((0, 2), dtype=np.int64)


def _first_byte(file: BinaryIO) -> tuple[int, bytes]:
    """Offset and value of the first byte that is not space; leaves the file there."""
    at = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(at)
    while block := file.read(BLOCK):
        rest = block.lstrip(SPACES)
        if rest:
            at += len(block) - len(rest)
            file.seek(at)
            return at, rest[:1]
        at += len(block)
    return at, b""


def _scan_lines(file: BinaryIO, start: int) -> np.ndarray:
    newlines, at = [], start
    buffer = bytearray(BLOCK)
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        block = np.frombuffer(buffer, np.uint8, size)
        newlines.append(np.flatnonzero(block == _NEWLINE) + at)
        at += size
    ends = np.concatenate([*newlines, np.array([at])])
    rows = np.stack([np.concatenate([[start], ends[:-1] + 1]), ends], axis=1)
    return _without_blank_lines(file, rows)


def _without_blank_lines(file: BinaryIO, rows: np.ndarray) -> np.ndarray:
    """Only short lines can be blank: look at those."""
    keep = np.ones(len(rows), dtype=bool)
    for i in np.flatnonzero(rows[:, 1] - rows[:, 0] < 16):
        file.seek(rows[i, 0])
        keep[i] = bool(file.read(int(rows[i, 1] - rows[i, 0])).strip(SPACES))
    return rows[keep]


def _scan_array(file: BinaryIO, start: int) -> np.ndarray:
    marks = RecordMarks(start, BLOCK)
    buffer = bytearray(BLOCK)
    while marks.close < 0 and (size := file.readinto(buffer)):  # type: ignore[attr-defined]
        buffer[size:] = b" " * (BLOCK - size)
        marks.feed(np.frombuffer(buffer, np.uint8))
    rows = marks.rows()
    if marks.close < 0:
        raise ScanError("the file breaks off before the closing ]", rows)
    scalars: list[tuple[int, int]] = []
    for begin, end in [*marks.odd_gaps, (marks.last_end, marks.close)]:
        file.seek(begin)
        gap = file.read(end - begin)
        # Between two records stands a comma; before the first and behind the last, none.
        fault = _read_gap(gap, begin, begin > start + 1, end < marks.close, scalars)
        if fault:
            raise ScanError(fault, _merged(rows[rows[:, 1] <= begin], scalars))
    rows = _merged(rows, scalars)
    if file.seek(marks.close + 1) and (rest := file.read().strip(SPACES)):
        raise ScanError(f"{rest[:20]!r} stands behind the closing ]", rows)
    return rows


def _read_gap(gap: bytes, at: int, comma_first: bool, comma_last: bool, found: list[tuple[int, int]]) -> str:
    """Add the elements in a gap, which are neither objects nor lists, to `found`; what is wrong with it, or ""."""
    value_next, end, before = not comma_first, len(gap), len(found)
    for token in _TOKEN.finditer(gap):
        if (token.group() == b",") == value_next:
            end = token.start()
            break
        if value_next:
            found.append((at + token.start(), at + token.end()))
        value_next = not value_next
    empty_array = not (comma_first or comma_last or len(found) > before)
    if end == len(gap) and (value_next == comma_last or empty_array):
        return ""
    return f"a {'comma too many' if value_next else 'missing comma'} at byte {at + end}"


def _merged(rows: np.ndarray, scalars: list[tuple[int, int]]) -> np.ndarray:
    if not scalars:
        return rows
    rows = np.concatenate([rows, np.array(scalars, dtype=np.int64)])
    return rows[np.argsort(rows[:, 0], kind="stable")]
