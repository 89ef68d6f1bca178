"""MMBench's and CCBench's tables: lettered questions with their pictures inside.

    python -m geochat.eval.tsv mmbench_dev_20230712.tsv --output mmbench_dev_20230712

writes the pictures to a folder, once; the questions then name them.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from geochat.errors import stop
from geochat.eval.files import Row, write_bytes

CIRCLE = 1_000_000
"""Turns of one question differ in `index` by multiples of this."""

_MISSING = {"", "nan"}
_SHORTEST_PICTURE = 64  # characters; anything shorter in the image column is the index of another row


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows by column. ValueError names the file and what is missing."""
    limit = csv.field_size_limit(sys.maxsize)  # a picture is a field
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table with tabs between columns ({error})") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, 2):
        if missing := [name for name in ("index", "question", "A", "image") if row.get(name) is None]:
            raise ValueError(f"{path}: line {number} has no column {missing[0]!r}")
        if not row["index"].isdecimal():
            raise ValueError(f"{path}: line {number}: the index {row['index']!r} is no number")
    return rows


def read_options(path: Path) -> list[Row]:
    """One question per row: hint, question and options as `text`; `circle` is equal for the turns of one question."""
    rows = read_table(path)
    pictures = _picture_rows(rows, path)
    questions = []
    for row in rows:
        options = {
            letter: row[letter] for letter in "ABCDE" if (row.get(letter) or "").lower() not in _MISSING
        }
        hint = [row["hint"]] if (row.get("hint") or "").lower() not in _MISSING else []
        lines = [*hint, row["question"], *(f"{letter}. {option}" for letter, option in options.items())]
        index = int(row["index"])
        kept = {
            name: value for name, value in row.items() if name not in ("image", "hint", "answer", *"ABCDE")
        }
        questions.append(
            {
                **kept,
                "question_id": index,
                "circle": index % CIRCLE,
                "text": "\n".join(lines),
                "options": options,
                "image": f"{pictures[row['index']]}.jpg",
                **({"ground_truth": row["answer"]} if row.get("answer") else {}),
            }
        )
    return questions


def _picture_rows(rows: Sequence[dict[str, str]], path: Path) -> dict[str, str]:
    """For every index that of the row which holds its picture."""
    held = {row["index"] for row in rows if len(row["image"]) >= _SHORTEST_PICTURE}
    found = {}
    for row in rows:
        index = row["index"] if row["index"] in held else row["image"].removesuffix(".0")
        if index not in held:
            raise ValueError(
                f"{path}: index {row['index']} has no picture, and {row['image']!r:.40} names none"
            )
        found[row["index"]] = index
    return found


def write_pictures(path: Path, folder: Path) -> int:
    """Decode the pictures to `folder/INDEX.jpg`, those that are not there yet; the number of files in all."""
    rows = read_table(path)
    held = set(_picture_rows(rows, path).values())
    for row in tqdm(rows, desc=path.name, disable=None):
        target = folder / f"{row['index']}.jpg"
        if row["index"] in held and not target.exists():
            try:
                write_bytes(target, base64.b64decode(row["image"], validate=True))
            except binascii.Error as error:
                raise ValueError(f"{path}: index {row['index']}: the picture is damaged ({error})") from None
    return len(held)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.tsv", description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path, help="the .tsv file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    arguments = parser.parse_args(argv)
    try:
        count = write_pictures(arguments.table, arguments.output)
    except (ValueError, OSError) as error:
        stop(error)
    print(f"{arguments.output}: {count} pictures")


if __name__ == "__main__":
    main()
