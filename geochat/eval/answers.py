"""From questions to answered rows: what is asked, and asking."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.chat.request import Request
from geochat.chat.text import Answer
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import Row

CHUNK = 2048
"""Questions that are handed over at once: their prompts are in memory."""


@dataclass(frozen=True)
class Item:
    """One question: the row that its answer will stand in, and the picture."""

    row: Row
    image: Path | None

    @property
    def key(self) -> str:
        return str(self.row["question_id"])

    @property
    def group(self) -> str:
        """Equal for questions about one picture."""
        return f"question {self.key}" if self.image is None else str(self.image)

    @property
    def request(self) -> Request:
        return Request.ask(self.row["prompt"], *([self.image] if self.image else []))


def collect(
    benchmark: Benchmark, questions: Sequence[Row], image_folder: Path, limit: int | None = None
) -> list[Item]:
    """Questions with their prompts and pictures, those that the benchmark leaves out excepted.

    Raises ValueError naming the question for a missing column, and the first missing files for missing pictures.
    """
    items: list[Item] = []
    for question in questions:
        if limit is not None and len(items) == limit:
            break
        where = f"{benchmark.name}: question {question['question_id']}"
        if (row := benchmark.prepare(question, where)) is None:
            continue
        name = benchmark.image_of(row, where)
        image = image_folder / name if name else None
        # Beside an answer, `text` are the model's words and `answer` would be mistaken for them.
        columns = {
            "expected" if key == "answer" else key: value for key, value in question.items() if key != "text"
        }
        items.append(Item({**columns, "prompt": benchmark.prompt_of(row, where)}, image))
    there = cache(Path.is_file)
    missing = [item.image for item in items if item.image and not there(item.image)]
    if missing:
        some = ", ".join(str(path) for path in missing[:3])
        raise ValueError(
            f"{len(missing)} of {len(items)} images are not there ({some} …); give --image-folder"
        )
    return items


def look(items: Sequence[Item]) -> list[Item]:
    """Each picture's size in pixels in its rows, and a hash by which a later run knows whether it is the same one."""
    seen = cache(_seen)
    return [Item({**item.row, **(seen(item.image) if item.image else {})}, item.image) for item in items]


def ask(
    chat: Chat | RemoteChat, items: Sequence[Item], *, batch_size: int | None, max_new_tokens: int
) -> Iterator[Row]:
    """Answered rows as they come, picture by picture: what questions have in common is computed once.

    `batch_size`: questions answered at a time; None leaves it to the model. A question that cannot be asked, or at which
    the model breaks, has text None and says why in `error`. Raises ConnectionError when a server is gone.
    """
    options = {"max_new_tokens": max_new_tokens} | ({"batch_size": batch_size} if batch_size else {})
    for chunk in _chunks(items):
        for index, result in chat.results([item.request for item in chunk], **options):
            if isinstance(result, Answer):
                yield {**chunk[index].row, "text": result.text, "finished": result.finished}
            else:
                yield {**chunk[index].row, "text": None, "finished": False, "error": str(result)}


def _chunks(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Whole pictures, as many as hold CHUNK questions."""
    chunk: list[Item] = []
    for _, questions in groupby(sorted(items, key=lambda item: item.group), key=lambda item: item.group):
        chunk += questions
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _seen(image: Path) -> Row:
    try:
        digest = hashlib.sha256(image.read_bytes()).hexdigest()[:16]
        with Image.open(image) as opened:
            return {"width": opened.width, "height": opened.height, "picture": digest}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {}  # the question will be counted as not asked, with the reason
