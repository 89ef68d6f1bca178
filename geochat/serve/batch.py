"""One question on many pictures: answers collect in a file as they come, and a stopped run goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.chat.request import Picture, Request
from geochat.data.rows import Row, open_rows, read_rows, row_line, write_rows
from geochat.data.tiles import Detection

ANSWERS, PARTIAL = "answers.jsonl", "answers.partial.jsonl"
_AT_ONCE = 32


@dataclass(frozen=True)
class Item:
    """A picture to ask about."""

    name: str
    """Names its row; no two are equal."""
    picture: Callable[[], Picture]
    """Raises ValueError when it cannot be read."""
    finish: Callable[[str], Row]
    """Answer → what stands in the row beside it; may write files. Raises ValueError when it cannot."""


def ask_all(
    chat: Chat | RemoteChat,
    items: Sequence[Item],
    query: str,
    folder: Path,
    settings: Row,
    decoding: dict[str, Any],
) -> list[Row]:
    """A row for every item, in their order, also in `folder`/answers.jsonl.

    A row has `name`, `prompt`, `text`, what `Item.finish` says, and `error`: None, or why there is no answer or no
    drawing. `settings` stand in every row. Rows of an earlier run that have no error are taken over.
    Raises ValueError when the folder holds answers to another question or of other settings.
    """
    asked = {"prompt": query, **settings}
    done = _resume(folder, asked)
    left = [item for item in items if item.name not in done]
    unfinished = folder / PARTIAL
    write_rows(unfinished, done.values())  # without the failures and a torn last line
    with (
        open_rows(unfinished, "a") as file,
        tqdm(total=len(items), initial=len(items) - len(left), unit="picture") as bar,
    ):
        for start in range(0, len(left), _AT_ONCE):
            for row in _ask(chat, left[start : start + _AT_ONCE], query, decoding):
                done[row["name"]] = {**row, **asked}
                file.write(row_line(done[row["name"]]))
                bar.update()
            file.flush()
            os.fsync(file.fileno())
    rows = [done[item.name] for item in items]
    write_rows(folder / ANSWERS, rows)
    unfinished.unlink()
    return rows


def box_rows(found: Iterable[Detection]) -> list[Row]:
    """Boxes as they stand in a row: phrase and corners."""
    return [{"phrase": one.phrase, "polygon": one.polygon.round(2).tolist()} for one in found]


def _ask(
    chat: Chat | RemoteChat, items: Sequence[Item], query: str, decoding: dict[str, Any]
) -> Iterator[Row]:
    requests: dict[str, Request] = {}
    errors: dict[str, ValueError] = {}
    for item in items:
        try:
            requests[item.name] = Request.ask(query, item.picture())
        except ValueError as error:
            errors[item.name] = error
    answers = dict(zip(requests, chat.answer_each(list(requests.values()), **decoding), strict=True))
    for item in items:
        answer = errors.get(item.name) or answers[item.name]
        row: Row = {"name": item.name, "text": None, "error": None}
        try:
            if isinstance(answer, ValueError):
                raise answer
            row |= {"text": answer.text, "finished": answer.finished, **item.finish(answer.text)}
        except ValueError as error:
            row["error"] = str(error)
        yield row


def _resume(folder: Path, asked: Row) -> dict[str, Row]:
    """Rows without an error that an earlier run has left, by name."""
    file = folder / (PARTIAL if (folder / PARTIAL).exists() else ANSWERS)
    rows = read_rows(file, torn_end=True) if file.exists() else []
    for row in rows:
        for key, now in asked.items():
            if row.get(key) != now:
                raise ValueError(
                    f"{folder}: holds answers of another run ({key} was {row.get(key)!r}, now {now!r}); "
                    "choose another --output"
                )
    return {row["name"]: row for row in rows if row["error"] is None}
