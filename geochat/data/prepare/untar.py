"""Unpacking tar shards of one data set into one folder, resumed after a kill.

A tar holds no checksum of its contents. What can be seen is seen: data that break off, a header that is damaged (Python's
`tarfile` takes that for the end), an end without the mark that closes every tar.
"""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from geochat.data.prepare.safety import safe_path
from geochat.data.prepare.unzip import BLOCK, Counts
from geochat.data.staged import staged


class Unpacker:
    """Writes the members of several shards below `folder` and remembers which shard a file came from."""

    def __init__(self, folder: Path, strip: int, recheck: bool, counts: Counts, bar: tqdm) -> None:
        """
        Args:
            strip: leading folders of a member's name to leave out, as `tar --strip-components` does.
            recheck: compare the contents of files that are there, and not only their size.
        """
        self.folder, self.strip, self.recheck = folder, strip, recheck
        self.counts, self.bar = counts, bar
        self._from: dict[str, int] = {}
        self._shards: list[Path] = []

    def unpack(self, shard: Path) -> None:
        """Raises: ValueError for an unsafe member or a collision; tarfile.TarError for a damaged shard."""
        self._shards.append(shard)
        with _open(shard) as (tar, file):
            done = 0
            for member in tar:
                self._take(tar, member)
                self.bar.update(tar.offset - done)
                done = tar.offset
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"broken or cut off at byte {tar.offset:,}")

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        try:
            path = safe_path(member.name)
            if not (member.isreg() or member.isdir()):
                what = "a link" if member.issym() or member.islnk() else "no ordinary file"
                raise ValueError(f"{member.name!r:.120} is {what}: refused; pack the files themselves")
        except ValueError as error:
            raise ValueError(f"{self._shards[-1]}: {error}") from None
        if member.isdir():
            return
        if len(path.parts) <= self.strip:
            self.counts.left_out += 1
            return
        name = PurePosixPath(*path.parts[self.strip :]).as_posix()
        target = self.folder / name
        twin = self._from.get(name)
        seen = twin is not None
        content = tar.extractfile(member)
        assert content is not None  # an ordinary file
        if _is_there(target, member, content, compare=self.recheck or seen):
            self.counts.twins += seen
            self.counts.present += not seen
            self._from.setdefault(name, len(self._shards) - 1)
            return
        if twin is not None:
            raise ValueError(
                f"{self._shards[twin]} and {self._shards[-1]} hold different files named {name}; "
                "unpack one of them into another folder"
            )
        self.counts.replaced += target.exists()
        content.seek(0)
        with staged(target, within=self.folder) as temporary, temporary.open("wb") as out:
            while block := content.read(BLOCK):
                out.write(block)
        self.counts.written += 1
        self._from[name] = len(self._shards) - 1


@contextmanager
def _open(shard: Path) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    with shard.open("rb", buffering=BLOCK) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        yield tar, file


def _is_there(target: Path, member: tarfile.TarInfo, content: IO[bytes], compare: bool) -> bool:
    try:
        found = target.stat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{target}: in the way, no ordinary file; move it or choose another --output")
    return found.st_size == member.size and not (compare and not _equal(target, content))


def _equal(path: Path, content: IO[bytes]) -> bool:
    with path.open("rb", buffering=0) as file:
        while block := content.read(BLOCK):
            if file.read(len(block)) != block:
                return False
    return True


def unpack_shards(
    shards: Sequence[Path], folder: Path, *, strip: int, recheck: bool, counts: Counts, bar: tqdm
) -> list[str]:
    """Unpack every shard; what is wrong with those that are damaged, by name. Their whole members are unpacked.

    Raises:
        ValueError: a member that may not be unpacked, or two shards that disagree about a file.
    """
    unpacker = Unpacker(folder, strip, recheck, counts, bar)
    damaged = []
    for shard in shards:
        try:
            unpacker.unpack(shard)
        except tarfile.TarError as error:
            damaged.append(f"{shard} ({error})")
    return damaged
