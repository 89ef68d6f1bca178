"""Where the records of a JSON file begin and end, found without parsing them.

The file is read once in blocks. In each, numpy finds quotes, backslashes and brackets; quotes that no backslash
escapes switch between text and structure, and brackets outside text give the depth. Right for every valid JSON
array, with any layout, and for every JSON Lines file; the caller parses the records.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

BLOCK = 1 << 19
"""Bytes looked at together: small enough to stay in the processor's cache."""

_QUOTE, _BACKSLASH, _NEWLINE, _COMMA = b'"\\\n,'
_SPACES = b" \t\r\n"
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
        rest = block.lstrip(_SPACES)
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
        keep[i] = bool(file.read(int(rows[i, 1] - rows[i, 0])).strip(_SPACES))
    return rows[keep]


def _scan_array(file: BinaryIO, start: int) -> np.ndarray:
    marks = _Marks(start)
    buffer = bytearray(BLOCK)
    while marks.close < 0 and (size := file.readinto(buffer)):  # type: ignore[attr-defined]
        marks.feed(np.frombuffer(buffer, np.uint8, size))
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
    if file.seek(marks.close + 1) and (rest := file.read().strip(_SPACES)):
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


class _Marks:
    """Reads blocks in order and keeps what crosses from one to the next."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.depth = 0
        self.inside = False
        self.backslashes = 0
        """Backslashes in a row at the end of the last block."""
        self.close = -1
        """Where the array's closing bracket stands, once it is found."""
        self._open = self.last_end = at + 1
        """Where the space before the next element begins."""
        self.odd_gaps: list[tuple[int, int]] = []
        self._starts: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        # Fresh arrays of this size would cost more in page faults than the comparisons themselves.
        self._scratch = tuple(np.empty(BLOCK, dtype=kind) for kind in (np.uint8, bool, bool))
        self._step = np.zeros(256, dtype=np.int8)
        self._step[list(b"[{")], self._step[list(b"]}")] = 1, -1
        self._other = np.ones(256, dtype=bool)
        self._other[list(_SPACES + b",")] = False

    def feed(self, block: np.ndarray) -> None:
        """Take the next bytes of the file."""
        marks = self._find(block)
        quote = block[marks] == _QUOTE
        quote &= ~self._escaped(block, marks, quote)
        # Parity is all that counts, so a sum of 8 bits may run over.
        before = np.cumsum(quote, dtype=np.uint8)
        before += self.inside
        self.inside = bool(before[-1] & 1) if len(before) else self.inside
        brackets = marks[((before & 1) == 0) & (block[marks] != _QUOTE)]
        if len(brackets):
            self._take(block, brackets)
        self.at += len(block)

    def _find(self, block: np.ndarray) -> np.ndarray:
        """Places of all quotes and brackets, in text or not."""
        folded, mask, brackets = (scratch[: len(block)] for scratch in self._scratch)
        # [ and { differ in one bit, ] and } in the same one; then 0x7b and 0x7d are left.
        np.bitwise_or(block, 0x20, out=folded)
        np.subtract(folded, 0x7B, out=folded)
        np.bitwise_and(folded, 0xFD, out=folded)
        np.equal(folded, 0, out=brackets)
        np.equal(block, _QUOTE, out=mask)
        np.logical_or(mask, brackets, out=mask)
        return np.flatnonzero(mask)

    def _escaped(self, block: np.ndarray, marks: np.ndarray, quote: np.ndarray) -> np.ndarray:
        """Which marks are quotes behind an odd number of backslashes."""
        escaped = np.zeros(len(marks), dtype=bool)
        behind = quote & (block[marks - 1] == _BACKSLASH)
        if len(marks) and marks[0] == 0:
            behind[0] = False
            escaped[0] = quote[0] and self.backslashes % 2 == 1
        run = np.flatnonzero(behind)
        step = 1
        while len(run):  # one round for each backslash of the longest run
            escaped[run] ^= True
            step += 1
            place = marks[run] - step
            at_start = run[place == -1]
            escaped[at_start] ^= self.backslashes % 2 == 1
            run = run[(place >= 0) & (block[place] == _BACKSLASH)]
        tail = block[-64:] if (block[-64:] != _BACKSLASH).any() else block
        ending = len(tail) - len(tail.tobytes().rstrip(b"\\"))
        self.backslashes = ending + (self.backslashes if ending == len(block) else 0)
        return escaped

    def _take(self, block: np.ndarray, brackets: np.ndarray) -> None:
        steps = self._step[block[brackets]]
        depth = np.cumsum(steps, dtype=np.int64) + self.depth
        done = np.flatnonzero(depth <= 0)
        if len(done):  # what follows the closing bracket is no longer ours
            brackets, steps, depth = (a[: done[0] + 1] for a in (brackets, steps, depth))
            self.close = int(brackets[-1]) + self.at
        self.depth = int(depth[-1])
        starts = brackets[(depth == 2) & (steps > 0)]
        ends = brackets[(depth == 1) & (steps < 0)] + 1
        self._starts.append(starts + self.at)
        self._ends.append(ends + self.at)
        self._check_gaps(block, starts, ends)
        if len(ends):
            self.last_end = int(ends[-1]) + self.at

    def _check_gaps(self, block: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """Remember the gaps before `starts` that hold more than one comma and space, or that began in another block."""
        before = np.concatenate([[self.last_end - self.at], ends])
        first = int(len(ends) > 0 and (not len(starts) or ends[0] <= starts[0]))
        before = before[first : first + len(starts)]
        length = starts - before
        odd = (before < 0) | (length <= 0)
        # No comma may stand before the first record.
        odd[:1] |= self.last_end == self._open
        whole = np.flatnonzero(~odd)
        if len(whole):
            size = length[whole]
            offset = np.cumsum(size) - size
            gap = block[np.repeat(before[whole] - offset, size) + np.arange(int(size.sum()))]
            commas = np.add.reduceat((gap == _COMMA).astype(np.int64), offset)
            others = np.add.reduceat(self._other[gap].astype(np.int64), offset)
            odd[whole] = (commas != 1) | (others > 0)
        for i in np.flatnonzero(odd):
            self.odd_gaps.append((int(before[i]) + self.at, int(starts[i]) + self.at))

    def rows(self) -> np.ndarray:
        """Byte ranges of the finished objects and lists so far."""
        starts, ends = np.concatenate([*self._starts, []]), np.concatenate([*self._ends, []])
        return np.stack([starts[: len(ends)], ends], axis=1).astype(np.int64)
