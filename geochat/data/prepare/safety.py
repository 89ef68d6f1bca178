"""What stands between an archive and the disk: names that stay inside, room enough, one writer."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from geochat.data.staged import remove_partials

_BLOCK = 4096
"""Bytes that a file system hands out at a time: small files take more room than they hold."""


def safe_path(name: str) -> PurePosixPath:
    """The path of a member below the folder that it is unpacked to.

    Raises:
        ValueError: an absolute name, one with `..`, or one with characters that no file name should have.
    """
    plain = name.replace("\\", "/")
    path = PurePosixPath(plain)
    if path.is_absolute() or re.match(r"[A-Za-z]:", plain):
        reason = "an absolute path"
    elif ".." in path.parts:
        reason = "a path that leaves the folder"
    elif not plain.isprintable():
        reason = "a name with control characters"
    else:
        return path
    raise ValueError(f"{name!r:.120} is {reason}: refused, nothing is written outside the folder")


def size_on_disk(size: int) -> int:
    """Bytes that a file of `size` bytes takes, roughly."""
    return -(-size // _BLOCK) * _BLOCK


def check_room(folder: Path, needed: int) -> None:
    """Raises: ValueError when the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{folder}: {gigabytes(needed)} are needed and {gigabytes(free)} are free; "
            "make room or choose another --output"
        )


def gigabytes(size: int) -> str:
    """Decimal, as download pages and disks state it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size:,} bytes"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, keep other runs out of it, and clear what a killed one left.

    Raises:
        ValueError: another run is writing there, or it is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{folder}: exists and is no folder; choose another --output") from None
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is writing there; wait for it or end it") from None
        except OSError:
            pass  # a network file system without locks: leave its unfinished files to their owners
        else:
            remove_partials(folder)
        yield
    finally:
        _locks.remove(descriptor)
        os.close(descriptor)


_locks: set[int] = set()


def _let_go() -> None:
    """A lock lasts as long as any process has it open. A forked one that outlives a killed parent must not keep it."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)
