"""One question on every picture of a folder or a list: rows, and the pictures with the boxes of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.data.boxes import parse_regions
from geochat.data.draw import draw_regions
from geochat.data.images import open_image
from geochat.data.rows import Row
from geochat.serve.batch import ask_all
from geochat.serve.pictures import save_picture


@dataclass(frozen=True)
class PictureFile:
    """A file, and the folder that its drawing goes into."""

    file: Path
    output: Path

    @property
    def name(self) -> str:
        return self.file.name

    def picture(self) -> Path:
        return self.file

    def finish(self, text: str) -> Row:
        image, regions = open_image(self.file), parse_regions(text)
        save_picture(draw_regions(image, regions), self.output / f"{self.name}.png")
        boxes = [
            {"phrase": region.phrase, "polygon": box.polygon(*image.size).round(2).tolist()}
            for region in regions
            for box in region.boxes
        ]
        return {"width": image.width, "height": image.height, "boxes": boxes}


def answer_pictures(
    chat: Chat | RemoteChat,
    files: Sequence[Path],
    query: str,
    output: Path,
    settings: Row,
    decoding: dict[str, Any],
) -> int:
    """Answers in `output`/answers.jsonl and a drawing per picture, NAME.png. Returns how many failed."""
    rows = ask_all(chat, [PictureFile(file, output) for file in files], query, output, settings, decoding)
    return sum(row["error"] is not None for row in rows)
