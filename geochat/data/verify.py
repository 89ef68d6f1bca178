"""Check an instruction file before training on it.

    python -m geochat.data.verify FILE --image-folder DIR [--workers N] [--json REPORT.json]
    python -m geochat.data.verify MIXTURE.yaml

Every record is read as training reads it and every image is opened and decoded once. The report lists, by row:
records that are malformed, images that are missing, unreadable or truncated, wrong numbers of `<image>`, boxes out of
grammar, and samples whose answers are all empty, which leave nothing to train on. Rows count from 0, and blank lines
of a JSON Lines file are no rows. Exit code 0: nothing found; 1: problems found; 2: the check could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from geochat.data.boxes import box_faults
from geochat.data.images import open_image
from geochat.data.mixture import Source, describe, read_sources
from geochat.data.pool import process_pool
from geochat.data.sample import IMAGE_TOKEN, ImageCountError, Sample
from geochat.data.staged import staged
from geochat.data.store import InstructionStore
from geochat.errors import stop

KINDS = {
    "record": "malformed records",
    "count": f"wrong number of {IMAGE_TOKEN}",
    "supervision": "nothing to train on",
    "box": "boxes out of grammar",
    "missing": "images missing",
    "image": "images unreadable or truncated",
}
_CHUNK = 32  # images that a process takes at a time


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one row of the file."""

    row: int
    kind: str
    """A key of `KINDS`."""
    reason: str


def check_record(record: object, row: int) -> tuple[Sample | None, list[Problem]]:
    """Read one record; the sample, where it can be read, and what is wrong with it."""
    try:
        sample = Sample.from_record(record, "")
    except ValueError as error:
        kind = "count" if isinstance(error, ImageCountError) else "record"
        return None, [Problem(row, kind, str(error).removeprefix(": "))]
    problems = []
    if not any(turn.text.strip() for turn in sample.turns if turn.role == "assistant"):
        problems.append(Problem(row, "supervision", "every answer is empty"))
    for number, turn in enumerate(sample.turns):
        problems += [Problem(row, "box", f"turn {number}: {fault}") for fault in box_faults(turn.text)]
    return sample, problems


def check_image(path: Path, decode: bool = True) -> tuple[str, str] | None:
    """Kind and reason when the image is missing or cannot be read; None when all is well."""
    try:
        if not path.is_file():
            return "missing", f"{path}: not found"
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered
        return "missing", f"{path}: cannot be looked up ({error})"
    if decode:
        try:
            open_image(path)
        except ValueError as error:
            return "image", str(error)
    return None


def verify(
    file: Path,
    image_folder: Path | None = None,
    *,
    decode: bool = True,
    workers: int = 0,
    progress: bool = False,
) -> tuple[int, list[Problem]]:
    """Number of rows and all problems, in order of rows.

    Args:
        image_folder: where the images lie; None checks the records only.
        decode: read every pixel, which finds truncated files; otherwise only look whether the file exists.
        workers: processes for images; 0 reads them in this one.
        progress: show bars on the terminal.

    Raises:
        ValueError: the file itself cannot be read, or the folder does not exist.
    """
    if image_folder is not None and not image_folder.is_dir():
        raise ValueError(f"--image-folder {image_folder}: no such folder")
    store = InstructionStore(file)
    problems: list[Problem] = []
    users: dict[str, list[int]] = {}
    bar = partial(tqdm, disable=not progress, file=sys.stderr, dynamic_ncols=True)
    for row in bar(range(len(store)), desc="records", unit=" rows"):
        try:
            record = store[row]
        except ValueError as error:
            problems.append(Problem(row, "record", str(error).removeprefix(f"{store.where(row)}: ")))
            continue
        sample, found = check_record(record, row)
        problems += found
        for image in sample.images if sample else ():
            users.setdefault(image, []).append(row)
    if image_folder is not None:
        paths = [image_folder / name for name in users]
        faults = _check_images(paths, decode, workers)
        for rows, fault in zip(users.values(), bar(faults, desc="images", total=len(paths)), strict=True):
            if fault:
                problems += [Problem(row, *fault) for row in rows]
    return len(store), sorted(problems, key=lambda problem: problem.row)


def _check_images(paths: list[Path], decode: bool, workers: int) -> Iterator[tuple[str, str] | None]:
    check = partial(check_image, decode=decode)
    if workers <= 1 or len(paths) <= _CHUNK:
        yield from map(check, paths)
        return
    with process_pool(workers) as pool:
        yield from pool.map(check, paths, chunksize=_CHUNK)


def report(file: Path, rows: int, problems: list[Problem], show: int) -> str:
    """The findings as text: counts by kind, then the first `show` rows of each."""
    lines = [f"{file}: {rows} rows, {len({p.row for p in problems})} with problems"]
    for kind, title in KINDS.items():
        found = [problem for problem in problems if problem.kind == kind]
        if not found:
            continue
        lines.append(f"\n{title}: {len(found)}")
        lines += [f"  row {problem.row}: {problem.reason}" for problem in found[:show]]
        if len(found) > show:
            lines.append(f"  … and {len(found) - show} more (--show {len(found)} or --json lists them)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the check; the exit code says whether problems were found."""
    parser = argparse.ArgumentParser(
        prog="python -m geochat.data.verify", description="Check an instruction file before training on it."
    )
    parser.add_argument(
        "file", type=Path, help="JSON array or JSON Lines of conversation records, or a mixture file"
    )
    parser.add_argument(
        "--image-folder", type=Path, help="folder of the images; without it only records are checked"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes reading images"
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="only look whether images exist; misses truncated ones"
    )
    parser.add_argument("--show", type=int, default=10, help="rows listed for each kind of problem")
    parser.add_argument("--json", type=Path, metavar="REPORT", help="write every problem to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)
    try:
        sources = read_sources([options.file], [options.image_folder] if options.image_folder else [])
        for source in sources:
            source.require_images()
        found = [
            verify(
                source.path,
                source.image_folder,
                decode=not options.no_decode,
                workers=options.workers,
                progress=not options.quiet,
            )
            for source in sources
        ]
        if options.json:
            _write_json(options.json, options.file, sources, found)
    except (ValueError, OSError) as error:
        stop(error)
    for source, (rows, problems) in zip(sources, found, strict=True):
        print(report(source.path, rows, problems, options.show))
    if len(sources) > 1:
        counts = [rows for rows, _ in found]
        samples = [source.count(rows) for source, rows in zip(sources, counts, strict=True)]
        print(f"\n{options.file}: {len(sources)} datasets")
        print("\n".join(f"  {name}: {share}" for name, share in describe(sources, counts, samples)))
    return 1 if any(problems for _, problems in found) else 0


def _write_json(
    path: Path, file: Path, sources: list[Source], found: list[tuple[int, list[Problem]]]
) -> None:
    """One file's content as it is; of a mixture, a list of them."""
    contents: list[dict[str, Any]] = []
    for source, (rows, problems) in zip(sources, found, strict=True):
        counts = {kind: sum(problem.kind == kind for problem in problems) for kind in KINDS}
        listed = [asdict(problem) for problem in problems]
        contents.append({"file": str(source.path), "rows": rows, "counts": counts, "problems": listed})
    content = contents[0] if len(contents) == 1 else {"file": str(file), "datasets": contents}
    with staged(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
