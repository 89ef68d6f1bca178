"""Are these the questions they are taken for? Notes on counts, ids, truths and pictures; nothing is changed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from geochat.eval.benchmark import Benchmark
from geochat.eval.files import Row

_SUFFIXES = (".jpg", ".png", ".tif", ".jpeg", ".tiff")


def ids_hash(ids: Iterable[object]) -> str:
    """SHA-256 of the sorted question ids, one per line: equal for equal subsets, in whatever order."""
    return hashlib.sha256("\n".join(sorted(map(str, ids))).encode()).hexdigest()


def notes(rows: Sequence[Row], benchmark: Benchmark, image_folder: Path | None = None) -> list[str]:
    """What a reader of the scores should know of the input. `rows` are questions or answers, those left out included.

    Raises: ValueError, as `Benchmark.prepare`.
    """
    kept = [
        prepared
        for row in rows
        if (prepared := benchmark.prepare(row, f"question {row['question_id']}")) is not None
    ]
    found = [*_subset(kept, benchmark), *_truths(kept, benchmark)]
    return found if image_folder is None else [*found, *_pictures(kept, benchmark, image_folder)]


def _subset(rows: Sequence[Row], benchmark: Benchmark) -> list[str]:
    expected = benchmark.expected
    if not expected:
        return []
    wanted, differences = expected.get("questions", len(rows)), []
    if len(rows) != wanted:
        differences.append(f"{len(rows)} questions, not {wanted}")
    for column, values in expected.get("counts", {}).items():
        there = Counter(str(row.get(column)) for row in rows)
        differences += [
            f"{column} {value}: {there[value]}, not {number}"
            for value, number in values.items()
            if there[value] != number
        ]
    if (
        not differences
        and "ids" in expected
        and ids_hash(row["question_id"] for row in rows) != expected["ids"]
    ):
        differences.append("as many questions, but other ones")
    if differences:
        return [f"not the published subset: {'; '.join(differences)}"]
    agree = "counts and ids agree" if "ids" in expected else "counts agree"
    return [f"the published subset of {wanted} questions ({agree})"]


def _truths(rows: Sequence[Row], benchmark: Benchmark) -> list[str]:
    """GeoChat-Bench's AID file has the truths "Pondgt", "Resortgt", …"""
    truths = [row.get("ground_truth") for row in rows]
    if not truths or not all(isinstance(truth, str) and truth.endswith("gt") for truth in truths):
        return []
    columns = sorted(set(benchmark.truth.values()))
    used = "the scores do not use it" if "ground_truth" not in columns else "no answer can equal it"
    return [
        f'every ground_truth ends in a stray "gt", as {truths[0]!r}; {used} (truth: {", ".join(columns)})'
    ]


def _pictures(rows: Sequence[Row], benchmark: Benchmark, folder: Path) -> list[str]:
    names = dict.fromkeys(benchmark.image_of(row, f"question {row['question_id']}") for row in rows)
    missing = [name for name in names if name and not (folder / name).is_file()]
    if not missing:
        return []
    found = [f"{len(missing)} of {len(names)} pictures are not in {folder}, the first is {missing[0]}"]
    first = folder / missing[0]
    others = [first.with_suffix(suffix) for suffix in _SUFFIXES if first.with_suffix(suffix).is_file()]
    return [f"{found[0]}; {others[0].name} is there: mend `image` in the benchmark"] if others else found
