"""Writing converted records: checked as training will read them, split by picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geochat.data.sample import Sample
from geochat.data.staged import write_records
from geochat.data.verify import check_record


def add_split_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for train.json, val.json and windows"
    )
    parser.add_argument(
        "--val-share", type=float, default=0.0, help="share of the pictures whose records go to val.json"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def checked(sample: Sample) -> dict[str, Any]:
    """The record. Raises: ValueError when `geochat.data.verify` finds fault with it."""
    record = sample.to_record()
    _, problems = check_record(record, 0)
    if problems:
        raise ValueError(f"{sample.id}: {problems[0].reason}; rename the class or the file it comes from")
    return record


def check_split(share: float, seed: int) -> None:
    """Raises: ValueError for a share outside [0, 1), or a negative seed."""
    if not 0 <= share < 1:
        raise ValueError(f"--val-share {share}: must be at least 0 and less than 1")
    if seed < 0:
        raise ValueError(f"--seed {seed}: must not be negative")


def held_out(names: Sequence[str], share: float, seed: int) -> set[str]:
    """Names for validation, chosen at random: `share` of them, at least one and never all when `share` is not 0.

    Raises:
        ValueError: as `check_split`, or fewer than two pictures to share out.
    """
    check_split(share, seed)
    if share == 0:
        return set()
    if len(names) < 2:
        raise ValueError(f"--val-share {share}: {len(names)} picture cannot be split; leave --val-share out")
    count = min(len(names) - 1, max(1, round(share * len(names))))
    order = np.random.default_rng(seed).permutation(len(names))
    ordered = sorted(names)
    return {ordered[i] for i in order[:count]}


def write_split(
    output: Path,
    records: Mapping[str, list[dict[str, Any]]],
    share: float,
    seed: int,
    held: set[str] | None = None,
) -> list[str]:
    """Write train.json and, with a share, val.json: no picture is in both. One line about each file.

    Args:
        records: by picture.
        held: the pictures for validation; by default chosen among those that have records.
    """
    if held is None:
        held = held_out([name for name, found in records.items() if found], share, seed)
    lines = []
    for file, chosen in (("train.json", records.keys() - held), ("val.json", held)):
        if file == "val.json" and not chosen:
            (output / file).unlink(missing_ok=True)  # of an earlier run: its pictures are in train.json now
            continue
        rows = [record for name in sorted(chosen) for record in records[name]]
        write_records(output / file, rows)
        pictures = sum(bool(records[name]) for name in chosen)
        lines.append(f"{output / file}: records: {len(rows):,}; pictures: {pictures:,}")
    return lines
