"""One question on every picture of a folder or a list: rows, and the pictures with the boxes of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.data.boxes import parse_regions
from geochat.data.draw import draw_regions
from geochat.data.images import open_image
from geochat.data.rows import Row
from geochat.data.tiles import Tile, detections
from geochat.serve.batch import Item, ask_all, box_rows
from geochat.serve.pictures import save_picture


def answer_pictures(
    chat: Chat | RemoteChat,
    files: Sequence[Path],
    query: str,
    output: Path,
    settings: Row,
    decoding: dict[str, Any],
) -> int:
    """Answers in `output`/answers.jsonl and a drawing per picture, NAME.png. Returns how many failed."""
    items = [Item(file.name, partial(Path, file), partial(draw_answer, file, output)) for file in files]
    rows = ask_all(chat, items, query, output, settings, decoding)
    return sum(row["error"] is not None for row in rows)


def draw_answer(file: Path, output: Path, text: str) -> Row:
    """Write the drawing of one picture. Returns what its row says of the boxes. ValueError when it cannot be written."""
    image = open_image(file)
    save_picture(draw_regions(image, parse_regions(text)), output / f"{file.name}.png")
    found = detections(text, Tile(0, 0, *image.size), *image.size)
    return {"width": image.width, "height": image.height, "boxes": box_rows(found)}
