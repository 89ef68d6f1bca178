"""Does every image that an instruction file names exist? Asked after unpacking."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from geochat.data.sample import Sample
from geochat.data.store import InstructionStore
from geochat.data.verify import report, verify


def add_check_options(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help=f"check this instruction file afterwards: {example}"
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="with --annotations: only look whether images exist"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read images"
    )
    parser.add_argument("--show", type=int, default=10, help="rows listed for each kind of problem")


def check_listing(options: argparse.Namespace, folder: Path) -> int:
    """The report of `geochat.data.verify` on `--annotations`; 1 when it found something, 0 when not or not asked."""
    if options.annotations is None:
        return 0
    rows, problems = verify(
        options.annotations,
        folder,
        decode=not options.no_decode,
        workers=options.workers,
        progress=not options.quiet,
    )
    print(report(options.annotations, rows, problems, options.show))
    return 1 if problems else 0


def images_named(file: Path, progress: bool, skip_malformed: bool = False) -> Iterator[str]:
    """Every image that the file names, once, as a path below the image folder.

    Raises:
        ValueError: the file cannot be read, or a record is malformed; file and row are named.
    """
    store = InstructionStore(file)
    seen: set[str] = set()
    for row in tqdm(
        range(len(store)), desc="records", unit=" rows", disable=not progress, dynamic_ncols=True
    ):
        try:
            images = Sample.from_record(store[row], store.where(row)).images
        except ValueError:
            if skip_malformed:
                continue
            raise
        for image in images:
            if image not in seen:
                seen.add(image)
                yield image


def count_by_folder(images: list[str]) -> Counter[str]:
    """How many of the images lie in each folder."""
    return Counter(image.rpartition("/")[0] or "." for image in images)
