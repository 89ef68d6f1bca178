"""An archive that was cut up with `split`: its parts in order, read as one file without joining them on disk."""

from __future__ import annotations

import io
import itertools
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

_SUFFIX = re.compile(r"(?P<stem>.*?)(?P<letters>[a-z]{2})")


class JoinedFile(io.RawIOBase):
    """Parts read as one file, seekable, read-only. Wrap it in `io.BufferedReader` for small reads."""

    def __init__(self, parts: Sequence[Path]) -> None:
        """Raises: OSError when a part cannot be opened."""
        super().__init__()
        self.parts = tuple(parts)
        self._files = [part.open("rb", buffering=0) for part in parts]
        self._ends = list(itertools.accumulate(os.fstat(file.fileno()).st_size for file in self._files))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}: before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        number, start = self._locate(self._at)
        if number == len(self._files):
            return 0
        room = memoryview(buffer).cast("B")[: self._ends[number] - self._at]
        self._files[number].seek(start)
        count = self._files[number].readinto(room) or 0
        if room.nbytes and not count:
            raise ValueError(f"{self.parts[number]} became shorter while it was read")
        self._at += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()

    def part_names(self, start: int, end: int) -> list[str]:
        """Names of the parts that hold the bytes from `start` up to `end`."""
        first, last = self._locate(start)[0], self._locate(max(start, end - 1))[0]
        return [part.name for part in self.parts[first : last + 1]]

    def _locate(self, offset: int) -> tuple[int, int]:
        """Number of the part that holds a byte, and the byte's offset in it; empty parts hold none."""
        number = bisect_right(self._ends, offset)
        return number, offset - (self._ends[number - 1] if number else 0)


def in_sequence(paths: Sequence[Path]) -> list[Path]:
    """The parts in order: `…aa`, `…ab`, … as `split` names them. One file alone is taken as a whole archive.

    Raises:
        ValueError: a part is absent, named twice, no file, or shorter than the others before the last.
    """
    for path in paths:
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise ValueError(f"{path}: {what}; name the parts, for example images_parta*")
    found: dict[str, Path] = {}
    for path in paths:
        match = _SUFFIX.fullmatch(path.name)
        if match is None:
            if len(paths) == 1:
                return [path]
            raise ValueError(
                f"{path}: the name of a part ends in two letters (…aa, …ab, …); leave other files out"
            )
        if twin := found.get(path.name):
            raise ValueError(f"{path.name} is given twice: {twin} and {path}; keep one")
        found[path.name] = path
    stems = sorted({name[:-2] for name in found})
    if len(stems) > 1:
        raise ValueError(f"parts of two archives: {stems[0]}* and {stems[1]}*; unpack one after the other")
    if (
        len(paths) == 1
        and not paths[0].name.endswith("aa")
        and (paths[0].suffix == ".zip" or _is_zip(paths[0]))
    ):
        return list(paths)  # a whole archive whose name happens to end in two letters
    ordered = [found[name] for name in sorted(found)]
    for number, path in enumerate(ordered):
        expected = stems[0] + _letters(number)
        if path.name != expected:
            raise ValueError(
                f"{expected} is missing: after it comes {path.name}; download it and name all parts"
            )
    _check_sizes(ordered)
    return ordered


def next_name(part: Path) -> str:
    """Name of the part that would follow."""
    stem, first, second = part.name[:-2], part.name[-2], part.name[-1]
    return stem + _letters((ord(first) - 97) * 26 + ord(second) - 96)


def _letters(number: int) -> str:
    return chr(97 + number // 26) + chr(97 + number % 26)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_sizes(parts: Sequence[Path]) -> None:
    """`split` makes all parts equally long but the last, which may be shorter."""
    sizes = [part.stat().st_size for part in parts]
    whole = max(sizes[:-1], default=sizes[-1])
    for part, size in zip(parts[:-1], sizes[:-1], strict=True):
        if size < whole:
            raise ValueError(
                f"{part} has {size:,} bytes, the other parts {whole:,}: it is cut off; download it again"
            )
    if sizes[-1] > whole:
        raise ValueError(
            f"{parts[-1]} has {sizes[-1]:,} bytes, the parts before it {whole:,}: those are cut off; "
            "download them again"
        )
