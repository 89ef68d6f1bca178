"""Save a folder so that a full disk or a kill leaves the previous save intact.

Everything is written and checked in a hidden folder beside its place. Renaming that folder is the commit: before it
the old files are untouched; after it, moving the files up needs no disk space, and if the process is killed in
between, the next save or load of the folder finishes the move (`recover`).

Work that takes minutes gives a key of what it writes from and how. The hidden folder then outlives a kill or a full
disk, and the next save with the same key finds in it what was complete.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STAGING = ".saving"
_COMMITTED = ".saved"
_RESUME = "resume.txt"  # in the hidden folder: the key of the work that was stopped
_KEPT = "weights.txt"  # in the committed folder: the weight files that this save consists of
# Weight files of an earlier save that the new one may not have written again.
_OWN_WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "non_lora_trainables.safetensors",
    *(f"{part}-{dtype}.gguf" for part in ("model", "mmproj") for dtype in ("f32", "f16", "bf16")),
)


@contextmanager
def staged(folder: Path, resume: str | None = None) -> Iterator[Path]:
    """Yields a folder to write into; on success its files replace those of `folder`, atomically.

    The folder is empty, unless `resume` is the key of an earlier save that did not come to its end. Files of `folder`
    that the save does not write stay, except weights of an earlier save. On an exception nothing of `folder` has
    changed. Errors of the file system (disk full, no permission) become one ValueError line.
    """
    staging = folder / _STAGING
    marker = staging / _RESUME
    stopped = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        if resume is None or not marker.exists() or marker.read_text() != resume:
            shutil.rmtree(staging, ignore_errors=True)  # left by a save that was killed
        staging.mkdir(exist_ok=True)
        if resume is not None:
            marker.write_text(resume)
        yield staging
        marker.unlink(missing_ok=True)
        weights = [file.name for file in staging.iterdir() if _is_weight(file.name)]
        (staging / _KEPT).write_text("\n".join(weights))
        _flush_files(staging)
        staging.rename(folder / _COMMITTED)
    except OSError as error:
        stopped = True
        reason = error.strerror or error
        again = "; the same command goes on from here" if resume is not None else ""
        raise ValueError(f"{folder}: not saved ({reason}); the previous save is unchanged{again}") from error
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        if resume is None or not stopped:
            shutil.rmtree(staging, ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    _flush(folder)
    recover(folder)


def unfinished(folder: Path) -> bool:
    """Whether a save of this folder was stopped before its commit."""
    return (folder / _STAGING).is_dir()


def recover(folder: Path) -> None:
    """Finish a committed save whose files had not all been moved when the process ended; else do nothing."""
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    kept = committed / _KEPT
    weights = set(kept.read_text().split()) if kept.exists() else set()
    for file in sorted(committed.iterdir()):
        if file != kept:
            file.replace(folder / file.name)
    if weights:
        for file in folder.iterdir():
            if _is_weight(file.name) and file.name not in weights:
                file.unlink()
    kept.unlink(missing_ok=True)
    committed.rmdir()


def _is_weight(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _OWN_WEIGHTS)


def _flush_files(folder: Path) -> None:
    for file in folder.iterdir():
        _flush(file)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
