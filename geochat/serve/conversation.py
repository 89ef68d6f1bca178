"""A conversation in the terminal: questions, answers as they grow, and what a line that starts with / does."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.chat.request import Request
from geochat.data.boxes import parse_boxes, parse_regions, to_geojson
from geochat.data.draw import draw_regions
from geochat.data.sample import Sample, Turn
from geochat.data.staged import staged, write_records
from geochat.serve.pictures import check_writable, is_url, open_picture, save_picture

HELP = """\
/image F        show another picture: a file or an http(s) address
/reset          forget the conversation, keep the picture
/boxes [F.png]  list the boxes of the last answer, draw them, and write them as GeoJSON beside the drawing
/save F.json    save the conversation as an instruction record
/help           this list
A line that ends with \\ goes on in the next; three quotes (\"\"\") open and close a text of several lines.
Ctrl-C stops an answer. An empty line ends."""


@dataclass
class Session:
    """The picture, what was said, and where drawings go."""

    chat: Chat | RemoteChat
    source: str | None
    image: Image.Image | None
    save_image: Path | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    said: Request | None = None
    """The conversation so far with its last answer left out."""
    answer: str = ""

    def ask(self, question: str) -> None:
        """Answer one question on the screen, piece by piece. Ctrl-C ends the answer, not the conversation."""
        if self.said is None:
            request = Request.ask(question, *([self.image] if self.image else []))
        else:
            request = self.said.follow(self.answer, question)
        pieces: list[str] = []
        stream = self.chat.stream(request, **self.decoding)
        with contextlib.closing(stream), contextlib.suppress(KeyboardInterrupt):
            for piece in stream:
                pieces.append(piece)
                print(printable(piece), end="", flush=True)
        print()
        text = "".join(pieces)
        if text:  # an answer stopped before its first word leaves the conversation as it was
            self.said, self.answer = request, text
        if self.save_image and self.image:
            save_picture(draw_regions(self.image, parse_regions(text)), self.save_image)
            note(f"{_count(len(parse_boxes(text)))} drawn in {self.save_image}")

    def command(self, line: str) -> None:
        """A line that starts with /. Raises ValueError for one that is not in `HELP`, or cannot be carried out."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/image" if argument:
                self.show(argument)
            case "/reset" if not argument:
                self.said, self.answer = None, ""
            case "/boxes":
                self.boxes(Path(argument) if argument else None)
            case "/save" if argument:
                self.save(Path(argument))
            case "/help":
                note(HELP)
            case _:
                raise ValueError(f"no command {line}; /help lists them")

    def show(self, source: str) -> None:
        self.source, self.image = source, open_picture(source)
        self.said, self.answer = None, ""

    def boxes(self, drawing: Path | None) -> None:
        """Print the last answer's boxes, draw them, and write them as GeoJSON in pixels of the picture."""
        regions = parse_regions(self.answer)
        if self.image is None or not any(region.boxes for region in regions):
            raise ValueError("the last answer has no boxes on a picture")
        drawing = drawing or Path(f"{_stem(self.source or '')}-boxes.png")
        check_writable(drawing)
        for region in regions:
            for box in region.boxes:
                corners = " ".join(f"({x:.1f}, {y:.1f})" for x, y in box.polygon(*self.image.size).tolist())
                print(f"{printable(region.phrase)}\t{box.format()}\t{corners}")
        save_picture(draw_regions(self.image, regions), drawing)
        geojson = drawing.with_suffix(".geojson")
        with staged(geojson) as temporary:
            temporary.write_text(json.dumps(to_geojson(regions, *self.image.size)) + "\n", encoding="utf-8")
        note(f"{_count(len(parse_boxes(self.answer)))} in {drawing} and {geojson}")

    def save(self, file: Path) -> None:
        """The conversation as a file that training and `geochat.data.verify` read."""
        if self.said is None:
            raise ValueError("nothing has been said that could be saved")
        images = (self.source,) if self.source else ()
        turns = (*self.said.turns, Turn("assistant", self.answer))
        write_records(file, [Sample(file.stem, images, turns).to_record()])
        note(f"{len(turns)} turns in {file}")


def converse(session: Session) -> None:
    """Questions from the keyboard, or from a pipe, until an empty line or the end of input."""
    if sys.stdin.isatty():
        note(HELP)
    for question in questions():
        try:
            if question.startswith("/"):
                session.command(question)
            else:
                session.ask(question)
        except (ValueError, OSError, RuntimeError) as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("stopped")


def questions() -> Iterator[str]:
    """What is typed, lines that belong together as one. Ctrl-C drops what has been typed."""
    typed = sys.stdin.isatty()
    while True:
        try:
            question = _question("USER: " if typed else "", "... " if typed else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                return
            note("\nan empty line ends")
            continue
        except UnicodeDecodeError:
            note("error: the input is not UTF-8 text")
            continue
        if not question:
            return
        yield question


def _question(prompt: str, more: str) -> str:
    line = input(prompt).strip()
    if line.startswith('"""'):
        text = line[3:]
        while not text.endswith('"""'):
            text += "\n" + input(more).rstrip()
        return text[:-3].strip()
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(more).strip()
    return line


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def note(text: str) -> None:
    """To the standard error: the standard output holds the answers alone."""
    print(printable(text), file=sys.stderr, flush=True)


def _stem(source: str) -> str:
    """A file name for what belongs to a picture."""
    name = source.partition("?")[0].rstrip("/") if is_url(source) else source
    return re.sub(r"[^\w.-]", "_", Path(name).stem) or "picture"


def _count(boxes: int) -> str:
    return "1 box" if boxes == 1 else f"{boxes} boxes"
