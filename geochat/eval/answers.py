"""From questions to answered rows: what is asked, asking, and what an earlier run has left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from geochat.chat.engine import Chat, Request
from geochat.eval.benchmark import Benchmark, index_by_id
from geochat.eval.files import Row, read_rows

ANSWERS, PARTIAL = "answers.jsonl", "answers.partial.jsonl"


@dataclass(frozen=True)
class Item:
    """One question: the row that its answer will stand in, and the picture."""

    row: Row
    image: Path | None

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
        seen = _seen(image) if image else {}
        items.append(Item({**columns, **seen, "prompt": benchmark.prompt_of(row, where)}, image))
    missing = [item.image for item in items if item.image and not item.image.is_file()]
    if missing:
        some = ", ".join(str(path) for path in missing[:3])
        raise ValueError(
            f"{len(missing)} of {len(items)} images are not there ({some} …); give --image-folder"
        )
    return items


def ask(
    chat: Chat, benchmark: Benchmark, items: Sequence[Item], *, batch_size: int, max_new_tokens: int
) -> Iterator[list[Row]]:
    """Answered rows, some batches at a time, task by task: a batch is done when its longest answer is, so that a word
    should not wait for a description. A question that cannot be asked has text None and says why in `error`."""
    columns = (benchmark.metric.column, benchmark.prompt.column)
    items = sorted(items, key=lambda item: [str(item.row.get(column)) for column in columns])
    for start in range(0, len(items), 4 * batch_size):
        chunk = items[start : start + 4 * batch_size]
        requests = [item.request for item in chunk]
        results = chat.answer_each(requests, max_new_tokens=max_new_tokens, batch_size=batch_size)
        yield [
            {**item.row, "text": None, "finished": False, "error": str(result)}
            if isinstance(result, ValueError)
            else {**item.row, "text": result.text, "finished": result.finished}
            for item, result in zip(chunk, results, strict=True)
        ]


def resume(folder: Path, items: Sequence[Item], identity: Row) -> dict[str, Row]:
    """Answers that an earlier run left in the folder, by question_id; failed ones are asked again.

    The other columns (truth, strata) are taken from the questions as they are now.
    Raises ValueError when the answers come from another model, prompt or picture, or other settings.
    """
    rows: list[Row] = []
    if (folder / PARTIAL).exists():
        rows = read_rows(folder / PARTIAL, torn_end=True)
    elif (folder / ANSWERS).exists():
        rows = read_rows(folder / ANSWERS)
    done = index_by_id([row for row in rows if row.get("text") is not None], str(folder))
    for item in items:
        if (row := done.get(str(item.row["question_id"]))) is None:
            continue
        asked: Row = {key: item.row[key] for key in ("prompt", "picture") if key in item.row}
        now: Row = {**identity, **asked}
        for key, value in now.items():
            if row.get(key) != value:
                raise ValueError(
                    f"{folder}: holds answers of another run ({key} was {row.get(key)!r}, now {value!r}); "
                    "choose another --output, or --overwrite"
                )
        done[str(item.row["question_id"])] = {**row, **item.row}
    return done


def _seen(image: Path) -> Row:
    """Size in pixels, and a hash of the file by which a later run knows whether it is the same picture."""
    try:
        digest = hashlib.sha256(image.read_bytes()).hexdigest()[:16]
        with Image.open(image) as opened:
            return {"width": opened.width, "height": opened.height, "picture": digest}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {}  # the question will be counted as not asked, with the reason
