"""One command measured from outside: time, processor time, and memory by kind.

Peak memory is the kernel's high-water mark of resident pages (VmHWM), exact and with mapped file pages counted. What
part of it is the process's own (RssAnon) and what part is mapped files that the kernel could drop (RssFile) is sampled
twenty times a second. Page cache that `read` and `write` leave behind belongs to no process and is not counted.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL = 0.05  # seconds; much less, and the measuring takes a core from what is measured


@dataclass
class Run:
    """Figures of one process; seconds and bytes."""

    wall: float
    cpu: float
    peak: int
    """High-water mark of resident memory, mapped files included."""
    own: int
    """Most anonymous memory seen."""
    mapped: int
    """Most mapped file pages seen (libraries are some 300 MB of them)."""
    stopped: bool = False
    """Killed because the machine ran out of memory."""


def measured(command: Sequence[str], *, floor: int = 0, log: Path | None = None) -> Run:
    """Run a command to its end. Raises RuntimeError with its last lines when it fails.

    floor: bytes that must stay available on this machine; the command is killed when less is left, and would be the
        kernel's first choice too.
    """
    start, own, mapped, stopped = time.perf_counter(), 0, 0, False
    with Path(log or os.devnull).open("w+b") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_kill_me_first
        )
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            state = _kilobytes(Path(f"/proc/{process.pid}/status"), ("RssAnon", "RssFile"))
            own, mapped = max(own, state.get("RssAnon", 0)), max(mapped, state.get("RssFile", 0))
            if floor and _kilobytes(Path("/proc/meminfo"), ("MemAvailable",))["MemAvailable"] < floor:
                process.kill()
                stopped = True
            time.sleep(_INTERVAL)
        wall = time.perf_counter() - start
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from subprocess
        if process.returncode and not stopped:
            output.seek(0)
            tail = output.read().decode(errors="replace")[-2000:] if log else "(give a log file to see why)"
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{tail}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, own, mapped, stopped)


def forget(folders: Iterable[Path]) -> None:
    """Drop the pages of these folders' files from the page cache, so that every run reads from the disk."""
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())  # a page that is not on the disk yet would stay
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _kill_me_first() -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")


def _kilobytes(file: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Fields of a /proc file, in bytes; empty when the process has just gone."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in fields if name in names}
