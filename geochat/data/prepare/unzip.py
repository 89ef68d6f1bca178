"""Unpacking a zip: what is planned before anything is written, CRCs checked, resumed after a kill."""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from geochat.data.prepare.parts import JoinedFile, in_sequence, next_name
from geochat.data.prepare.safety import check_room, gigabytes, safe_path, size_on_disk
from geochat.data.staged import staged

BLOCK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)

Place = Callable[[PurePosixPath], PurePosixPath | None]
"""Where a member of the archive goes below the output folder; None leaves it out."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive and the path below the output folder that it gets."""

    info: zipfile.ZipInfo
    target: str


@dataclass
class Counts:
    """What became of the members of an archive."""

    written: int = 0
    present: int = 0
    """Already there."""
    replaced: int = 0
    """Of the written: an older file of that name had other content."""
    twins: int = 0
    """Same name and same content as another member."""
    left_out: int = 0

    def __str__(self) -> str:
        numbers = {
            "there already": self.present,
            "replaced, since the content differed": self.replaced,
            "twice in the archive": self.twins,
            "left out": self.left_out,
        }
        notes = [f"{what}: {number:,}" for what, number in numbers.items() if number]
        return "; ".join([f"files unpacked: {self.written:,}", *notes])


@contextmanager
def open_zip(paths: Sequence[Path]) -> Iterator[tuple[zipfile.ZipFile, JoinedFile]]:
    """The archive that the parts make up, and the parts as one file.

    Raises:
        ValueError: a part is missing or cut off, or this is no zip.
    """
    parts = in_sequence(paths)
    with JoinedFile(parts) as joined, io.BufferedReader(joined, BLOCK) as file:
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(_no_archive(joined, file, error)) from None
        with archive:
            yield archive, joined


def _no_archive(joined: JoinedFile, file: IO[bytes], error: zipfile.BadZipFile) -> str:
    last = joined.parts[-1]
    file.seek(0)
    if file.read(2) != b"PK":
        return f"{joined.parts[0]}: not a zip archive; is it a web page saved in its place? Download it again"
    followed = f", or {next_name(last)} follows it and is missing" if len(joined.parts) > 1 else ""
    size = last.stat().st_size
    return (
        f"{last}: the list of files at the end of the archive is missing or damaged ({error}); the file is cut off "
        f"at {size:,} bytes{followed}. Compare its size with the download page and download what differs"
    )


def plan(archive: zipfile.ZipFile, place: Place, counts: Counts) -> list[Member]:
    """The files to unpack, in the order in which they lie in the archive.

    Raises:
        ValueError: a member that may not be unpacked, or two that would get one name and differ.
    """
    members: dict[str, Member] = {}
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        path = _checked(archive, info)
        if info.is_dir():
            continue
        target = place(path)
        if target is None:
            counts.left_out += 1
            continue
        member = Member(info, target.as_posix())
        other = members.setdefault(member.target, member)
        if other is member:
            continue
        if (other.info.CRC, other.info.file_size) != (info.CRC, info.file_size):
            raise ValueError(
                f"{other.info.filename} and {info.filename} differ and would both become {member.target}; "
                "unpack this archive by hand, into two folders"
            )
        counts.twins += 1
    return list(members.values())


def _checked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> PurePosixPath:
    path = safe_path(info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if stat.S_ISLNK(kind) else "no ordinary file"
        raise ValueError(f"{info.filename!r:.120} is {what}: refused; pack the files themselves")
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted; unpack the archive with its password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"{info.filename}: compression {info.compress_type} is not read here; unpack it with 7z"
        )
    return path


def unpack_zip(
    paths: Sequence[Path], folder: Path, place: Place, *, recheck: bool = False, progress: bool = True
) -> Counts:
    """Unpack an archive, one file or its parts; files that are there already stay.

    Args:
        recheck: compare the CRC of files that are there, and not only their size.

    Raises:
        ValueError: the archive cannot be used, there is no room, or files in it are damaged. Those are named once
            all others are unpacked.
    """
    counts = Counts()
    with open_zip(paths) as (archive, joined):
        members = plan(archive, place, counts)
        looked_at = tqdm(members, desc="looking", unit="file", disable=not progress, dynamic_ncols=True)
        to_do = [
            member for member in looked_at if not _is_there(folder / member.target, member, recheck, counts)
        ]
        check_room(folder, sum(size_on_disk(member.info.file_size) for member in to_do))
        total = sum(member.info.file_size for member in to_do)
        damaged: list[tuple[Member, Exception]] = []
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="unpacking", disable=not progress, dynamic_ncols=True
        ) as bar:
            for member in to_do:
                try:
                    _extract(archive, member, folder, bar)
                    counts.written += 1
                except _DAMAGE as error:
                    damaged.append((member, error))
        if damaged:
            raise ValueError(_damage(joined, damaged, len(members)))
    return counts


def _is_there(target: Path, member: Member, recheck: bool, counts: Counts) -> bool:
    try:
        found = target.stat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{target}: in the way, no ordinary file; move it or choose another --output")
    if found.st_size == member.info.file_size and not (recheck and crc(target) != member.info.CRC):
        counts.present += 1
        return True
    counts.replaced += 1
    return False


def crc(path: Path) -> int:
    """CRC-32 of a file, as zip archives hold it."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def _extract(archive: zipfile.ZipFile, member: Member, folder: Path, bar: tqdm) -> None:
    """`ZipFile` compares the CRC when it has read the last byte, before the file gets its name."""
    with (
        archive.open(member.info) as source,
        staged(folder / member.target, within=folder) as temporary,
        temporary.open("wb") as file,
    ):
        while block := source.read(BLOCK):
            file.write(block)
            bar.update(len(block))


def _damage(joined: JoinedFile, damaged: list[tuple[Member, Exception]], total: int) -> str:
    parts: dict[str, None] = {}
    for member, _ in damaged:
        start = member.info.header_offset
        end = start + 30 + len(member.info.orig_filename) + member.info.compress_size
        parts.update(dict.fromkeys(joined.part_names(start, end)))
    first, reason = damaged[0]
    return (
        f"{len(damaged):,} of {total:,} files are damaged in the archive, first {first.info.filename} "
        f"({gigabytes(first.info.file_size)}: {reason}). Download {', '.join(parts)} again and repeat the command: "
        "what is unpacked stays"
    )
