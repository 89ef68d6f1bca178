"""What a run has answered so far, on disk: kept while it works, found again after a kill, joined at the end.

Every shard appends to its own answers.partial.I-of-N.jsonl and reads all of them, so that a stopped run may go on with
another number of shards. The shard that finds every question answered writes answers.jsonl and removes the parts.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from geochat.eval.answers import Item
from geochat.eval.files import Row, read_rows, write_rows
from geochat.eval.shards import Shard

ANSWERS = "answers.jsonl"
SYNC_SECONDS = 1.0
"""What a machine that fails may take with it; a killed process loses nothing that it has written."""


@dataclass(frozen=True)
class Progress:
    folder: Path
    shard: Shard
    identity: Row
    """Columns of every row that tell one run from another: the model and the decoding settings."""

    @property
    def file(self) -> Path:
        return self.folder / f"answers.partial.{self.shard}.jsonl"

    def begin(self, share: Sequence[Item], overwrite: bool = False) -> list[Item]:
        """The questions of the share that are still to be asked; those that failed are asked again.

        Raises ValueError when there are answers of another model, prompt or picture, or of other settings.
        """
        if overwrite and self.shard.count > 1:
            raise ValueError(
                f"--overwrite works with one process; delete {self.folder} to ask again with more"
            )
        with _alone(self.folder):
            if overwrite:
                for file in (self.folder / ANSWERS, *self._parts("*")):
                    file.unlink(missing_ok=True)
            write_rows(self.file, _sound(_read_part(self.file)))  # without failures and a torn last line
            done = self._answered()
            return [item for item in share if not self._holds(done, item) or done[item.key]["text"] is None]

    def keep(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Append each row to the file before it is passed on."""
        with self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            synced = time.monotonic()
            for row in rows:
                file.write(json.dumps({**row, **self.identity}, ensure_ascii=False) + "\n")
                file.flush()
                if time.monotonic() > synced + SYNC_SECONDS:
                    os.fsync(file.fileno())
                    synced = time.monotonic()
                yield row

    def join(self, items: Sequence[Item], keep_others: bool) -> list[Row] | None:
        """All answers in the order of the questions, written to answers.jsonl once no shard has any left to ask.
        None before that, and where another shard has just written them.

        Columns beside the answer (truth, strata) are taken from the questions as they are now. `keep_others`: answers
        to questions that are not among `items` stay in the file.
        """
        with _alone(self.folder):
            if not self.file.exists():
                return None
            done = self._answered()
            if not all(self._holds(done, item) for item in items):
                if not self.file.stat().st_size:
                    self.file.unlink()  # nothing was left for this shard
                return None
            rows = [{**done.pop(item.key), **item.row} for item in items]
            write_rows(self.folder / ANSWERS, rows + (list(done.values()) if keep_others else []))
            for part in self._parts("*"):
                part.unlink()
        return rows

    def _answered(self) -> dict[str, Row]:
        """Rows by question_id. Failures count where a shard of this run recorded them: it begins by forgetting them."""
        rows = [row for part in self._parts(f"*-of-{self.shard.count}") for row in _read_part(part)]
        rows += [row for part in self._parts("*") for row in _sound(_read_part(part))]
        if (self.folder / ANSWERS).exists():
            rows += _sound(read_rows(self.folder / ANSWERS))
        return {str(row["question_id"]): row for row in rows}

    def _holds(self, done: dict[str, Row], item: Item) -> bool:
        if (row := done.get(item.key)) is None:
            return False
        asked = {key: item.row[key] for key in ("prompt", "picture") if key in item.row}
        for key, value in (self.identity | asked).items():
            if row.get(key) != value:
                raise ValueError(
                    f"{self.folder}: holds answers of another run ({key} was {row.get(key)!r}, now {value!r}); "
                    "choose another --output, or --overwrite"
                )
        return True

    def _parts(self, numbers: str) -> list[Path]:
        return sorted(self.folder.glob(f"answers.partial.{numbers}.jsonl"))


def _read_part(path: Path) -> list[Row]:
    return read_rows(path, torn_end=True) if path.exists() else []


def _sound(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get("text") is not None]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other shard reads or joins meanwhile. A network file system without locks does without."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
