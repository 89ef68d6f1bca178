"""The records of a JSON array as byte ranges, block by block, with numpy."""

from __future__ import annotations

import numpy as np

SPACES = b" \t\r\n"
_ONE, _LAST, _EVEN = np.uint64(1), np.uint64(63), np.uint64(0x5555_5555_5555_5555)
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'


class RecordMarks:
    """Finds the elements of a JSON array in blocks of bytes, read in order from `at`, where the array opens.

    Rows of 64 bytes become the bits of a word. Quotes that no backslash escapes switch between text and structure
    (a running parity, after simdjson: Langdale and Lemire 2019), and brackets outside text give the depth.
    """

    def __init__(self, at: int, block_size: int) -> None:
        self.at = at
        self.depth = 0
        self.inside = False
        self.escaping = False
        """Whether the last block ended in a backslash that escapes the next byte."""
        self.close = -1
        """Where the array's closing bracket stands, once it is found."""
        self._open = self.last_end = at + 1
        """Where the space before the next element begins."""
        self.odd_gaps: list[tuple[int, int]] = []
        self._starts: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        # Fresh arrays of this size would cost more in page faults than the comparisons themselves.
        self._mask, self._folded = np.empty(block_size, dtype=bool), np.empty(block_size, dtype=np.uint8)
        self._step = np.zeros(256, dtype=np.int8)
        self._step[list(b"[{")], self._step[list(b"]}")] = 1, -1
        self._other = np.ones(256, dtype=bool)
        self._other[list(SPACES + b",")] = False

    def feed(self, block: np.ndarray) -> None:
        """Take the next `block_size` bytes of the file, uint8; the last block is filled up with spaces."""
        quotes = self._bits(np.equal(block, _QUOTE, out=self._mask))
        quotes &= ~self._escaped(block)
        # [ and { differ in one bit, ] and } in the same one; then 0x7b and 0x7d are left.
        folded = np.bitwise_or(block, 0x20, out=self._folded)
        np.subtract(folded, 0x7B, out=folded)
        np.bitwise_and(folded, 0xFD, out=folded)
        brackets = self._bits(np.equal(folded, 0, out=self._mask))
        brackets &= ~self._in_text(quotes)
        bits = np.unpackbits(brackets.view(np.uint8), bitorder="little")
        places = np.flatnonzero(bits.view(bool))
        if len(places):
            self._take(block, places)
        self.at += len(block)

    @staticmethod
    def _bits(mask: np.ndarray) -> np.ndarray:
        """Bit i % 64 of word i // 64 is `mask[i]`."""
        return np.packbits(mask, bitorder="little").view("<u8")

    def _in_text(self, quotes: np.ndarray) -> np.ndarray:
        """Bits of the bytes between an opening quote and its closing one: the parity of the quotes so far."""
        parity = quotes.copy()
        for shift in (1, 2, 4, 8, 16, 32):
            parity ^= parity << np.uint64(shift)
        odd = (parity >> _LAST).astype(np.int64)
        before = np.cumsum(odd) - odd + self.inside
        self.inside = bool((before[-1] + odd[-1]) & 1)
        # All bits of a word turn round when an odd number of quotes stands before it.
        parity ^= -(before & 1).astype(np.int64).view(np.uint64)
        return parity

    def _escaped(self, block: np.ndarray) -> np.ndarray:
        """Bits of the bytes that a backslash escapes, among those that are no backslash themselves."""
        slashes = self._bits(np.equal(block, _BACKSLASH, out=self._mask))
        carry = np.zeros_like(slashes)  # 1 where the last byte before the word escapes the word's first
        while True:
            carry[0] = self.escaping
            active = slashes & ~carry
            starts = active & ~(active << _ONE)
            # Adding a run's first bit to the run clears it and sets the bit behind it. A run escapes what is behind
            # it if its length is odd: if it begins at an even place and ends before an odd one, or the reverse.
            past_even, past_odd = active + (starts & _EVEN), active + (starts & ~_EVEN)
            out = (active & ~past_odd) >> _LAST
            if np.array_equal(carry[1:], out[:-1]):
                self.escaping = bool(out[-1])
                return (past_even & ~active & ~_EVEN) | (past_odd & ~active & _EVEN) | carry
            carry[1:] = out[:-1]

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
