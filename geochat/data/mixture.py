"""Which instruction files are drawn from, and how often: named one by one, or in a mixture file.

# mixture.yaml; relative paths start at its folder
- path: geochat.json
  image_folder: images
- path: /data/own.jsonl
  image_folder: /data/own
  weight: 2.5     # every row twice an epoch, and a fixed half of them once more; default 1
  name: own       # in messages and reports; default: the path
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

_SUFFIXES = (".yaml", ".yml")
_KEYS = ("path", "image_folder", "weight", "name")


@dataclass(frozen=True)
class Source:
    """One instruction file of a mixture."""

    path: Path
    image_folder: Path | None
    weight: float
    """How often a row of it is seen in an epoch."""
    name: str
    entry: str
    """Where it is named, for messages."""

    def count(self, rows: int) -> int:
        """Samples that so many rows give in an epoch."""
        whole = int(self.weight)
        return whole * rows + round((self.weight - whole) * rows)

    def draw(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The rows of an epoch: all of them as often as the weight has whole parts, then a choice for the rest of it."""
        whole = int(self.weight)
        some = random.choice(len(rows), self.count(len(rows)) - whole * len(rows), replace=False)
        return np.concatenate([np.tile(rows, whole), rows[np.sort(some)]])

    def digest(self) -> str:
        """SHA-256 of the file's content, in hexadecimal digits."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def require_images(self) -> None:
        """Raises: ValueError when the image folder is not there."""
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise ValueError(f"{self.entry}: image folder {self.image_folder}: no such folder")


def read_sources(
    paths: Sequence[str | Path], image_folders: Sequence[str | Path] = (), weights: Sequence[float] = ()
) -> list[Source]:
    """The instruction files, or the entries of the one mixture file.

    Args:
        image_folders: one for each path, or one for all; in a mixture file, for the entries that name none.
        weights: one for each path; all 1 where none is given.

    Raises:
        ValueError: naming flag or entry: no such file, a file twice, a key or a number that cannot be.
    """
    files, folders = [Path(path) for path in paths], [Path(folder) for folder in image_folders]
    mixtures = [file for file in files if file.suffix in _SUFFIXES]
    if mixtures:
        if len(files) > 1 or len(folders) > 1 or weights:
            raise ValueError(
                f"{mixtures[0]} is a mixture file: it stands alone and holds the weights; one --image_folder at "
                "most, for the entries that name none"
            )
        found = _read_mixture(files[0], folders[0] if folders else None)
    else:
        found = _from_flags(files, folders, list(weights))
    _check(found)
    return found


def _from_flags(files: list[Path], folders: list[Path], weights: list[float]) -> list[Source]:
    if len(folders) not in (0, 1, len(files)):
        raise ValueError(f"{len(folders)} --image_folder for {len(files)} --data_path: give one, or one each")
    if len(weights) not in (0, len(files)):
        raise ValueError(f"{len(weights)} --data_weights for {len(files)} --data_path: give one each")
    each: list[Path | None] = [*folders] if len(folders) == len(files) else [*folders, None][:1] * len(files)
    return [
        Source(file, folder, weight, str(file), f"instruction file {file}")
        for file, folder, weight in zip(files, each, weights or [1.0] * len(files), strict=True)
    ]


def _read_mixture(file: Path, image_folder: Path | None) -> list[Source]:
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: expected a list of datasets, each with a path")
    return [_entry(entry, file, number, image_folder) for number, entry in enumerate(entries, 1)]


def _entry(entry: Any, file: Path, number: int, image_folder: Path | None) -> Source:
    where = f"{file}: entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{where}: expected the keys {', '.join(_KEYS)}; path is needed")
    if unknown := sorted(map(str, entry.keys() - set(_KEYS))):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(_KEYS)}")
    folder, name, weight = entry.get("image_folder"), entry.get("name"), entry.get("weight", 1)
    for key, value in (("image_folder", folder), ("name", name)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be text, found {value!r:.40}")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"{where}: weight must be a number, found {weight!r:.40}")
    path = file.parent / entry["path"]
    return Source(
        path=path,
        image_folder=file.parent / folder if folder else image_folder,
        weight=float(weight),
        name=name or entry["path"],
        entry=f"{where}, {path}",
    )


def describe(sources: Sequence[Source], rows: Sequence[int], samples: Sequence[int]) -> list[tuple[str, str]]:
    """Name of each source, and what its rows give to an epoch."""
    whole = max(sum(samples), 1)
    return [
        (
            source.name,
            f"{count:,} samples of {n:,} rows, weight {source.weight:g}, {count / whole:.1%} of all",
        )
        for source, n, count in zip(sources, rows, samples, strict=True)
    ]


def _check(sources: list[Source]) -> None:
    seen: dict[Path, Source] = {}
    for source in sources:
        if not source.path.is_file():
            raise ValueError(f"{source.entry}: no such file")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"{source.entry}: its weight must be above 0, found {source.weight:g}")
        if seen.setdefault(source.path.resolve(), source) is not source:
            raise ValueError(f"{source.entry}: the file is named twice: say how often with its weight")
