"""The users of the web demo: what each has said and shown, and the folder that their pictures lie in."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from PIL import ExifTags, Image, ImageOps

from geochat.chat.request import Request
from geochat.data.boxes import Box, parse_boxes
from geochat.data.images import open_image
from geochat.serve.web_view import Draft, geojson, on_screen, reduced, to_download

KEPT_FOLDERS = 4
"""Of drawings and of answers: a browser may still be fetching the last few."""

SECONDS_BETWEEN_LOOKS = 0.2
"""How often a waiting question asks for its place in the queue."""


class Ticket(Protocol):
    """One question on its way: yields its answer in pieces, or raises what went wrong with it."""

    @property
    def position(self) -> int:
        """0: being answered; n: n-th of those that wait."""

    def cancel(self) -> None: ...

    def __iter__(self) -> Iterator[str]: ...


class Asked(Protocol):
    """What answers questions: `geochat.chat.service.Service`, or `geochat.serve.streams.Streams`."""

    def submit(self, request: Request, *, user: str, **options: Any) -> Ticket: ...


@dataclass(eq=False)
class Exchange:
    question: str
    answer: str = ""
    """As far as it has arrived."""


class Session:
    """One user's conversation about one picture. Events of one user may run at the same time."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.picture: Path | None = None
        self.size = (0, 0)
        self.small: Image.Image | None = None
        """The picture, reduced if it is large."""
        self.exchanges: list[Exchange] = []
        self.draft = Draft()
        self._on_screen = (0, 0)
        self._ticket: Ticket | None = None
        self._numbers = {"picture": count(), "answer": count()}
        self._lock = threading.Lock()

    def show(self, file: Path) -> None:
        """Take a copy of a picture and begin a new conversation about it. ValueError when it cannot be read.

        A photograph that was taken sideways is turned upright.
        """
        try:
            image = open_image(file)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), file.name)) from None
        upright = ImageOps.exif_transpose(image)
        self.clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.picture = self.folder / "picture"
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            shutil.copyfile(file, self.picture)
        else:
            upright.save(self.picture, format="PNG", compress_level=1)
        self.size, self.small = upright.size, reduced(upright)

    def ask(self, service: Asked, question: str, **options: Any) -> Iterator[int]:
        """Put a question and follow its answer in `exchanges`. Yields the number of questions before it, 0 once it
        is being answered. ValueError when it cannot be asked; an answer without a word leaves no exchange."""
        if not question.strip():
            raise ValueError("write a question first")
        with self._lock:
            if self._ticket is not None:
                raise ValueError("an answer is still being written: stop it first")
            self._ticket = ticket = service.submit(self._request(question), user=self.name, **options)
        exchanges, exchange = self.exchanges, Exchange(question)
        exchanges.append(exchange)
        try:
            while before := ticket.position:
                yield before
                time.sleep(SECONDS_BETWEEN_LOOKS)
            for piece in ticket:
                exchange.answer += piece
                yield 0
        finally:
            ticket.cancel()
            with self._lock:
                if self._ticket is ticket:
                    self._ticket = None
                if not exchange.answer and exchange in exchanges:
                    exchanges.remove(exchange)

    def take_back(self) -> str:
        """Forget the last exchange. Returns its question; ValueError when there is none."""
        self.stop()
        with self._lock:
            if not self.exchanges:
                raise ValueError("there is no answer yet")
            return self.exchanges.pop().question

    def stop(self) -> None:
        """End the answer that is being written; what has arrived of it stays."""
        with self._lock:
            if self._ticket is not None:
                self._ticket.cancel()
            self._ticket = None

    def forget(self) -> None:
        """Begin a new conversation about the same picture."""
        self.stop()
        self.exchanges = []
        self.draft = Draft()

    def clear(self) -> None:
        """Forget everything and delete the user's files."""
        self.forget()
        self.picture = self.small = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def tap(self, x: float, y: float, angle: float) -> None:
        """A corner of the user's box, in pixels of the picture on the screen."""
        width, height = self._on_screen
        if self.small is not None:
            self.draft = replace(self.draft, angle=angle).tap(100 * x / width, 100 * y / height)

    def box(self) -> Box | None:
        """The user's box, once both corners are there."""
        return self.draft.box(*self.size)

    def draw(self) -> Path | None:
        """Write the picture with the boxes of the last answer and of the user; None without a picture."""
        if self.small is None:
            return None
        drawn = on_screen(self.small, self.exchanges[-1].answer if self.exchanges else "", self.draft)
        self._on_screen = drawn.size
        file = self._folder("picture") / "picture.jpg"
        drawn.save(file, quality=92, subsampling=0)
        return file

    def save_answer(self) -> tuple[Path | None, Path | None]:
        """Write the last answer to download: the picture in its original size with the boxes, None without boxes, and
        the boxes as GeoJSON."""
        if self.picture is None or not self.exchanges:
            return None, None
        last, folder = self.exchanges[-1], self._folder("answer")
        boxes = folder / "boxes.geojson"
        boxes.write_text(geojson(last.question, last.answer, *self.size), encoding="utf-8")
        if not parse_boxes(last.answer):
            return None, boxes
        png = folder / "boxes.png"
        to_download(open_image(self.picture), last.answer).save(png, compress_level=1)
        return png, boxes

    def _folder(self, kind: str) -> Path:
        """A new folder for files to fetch; of the older ones of its kind only a few stay."""
        number = next(self._numbers[kind])
        shutil.rmtree(self.folder / f"{kind}-{number - KEPT_FOLDERS}", ignore_errors=True)
        folder = self.folder / f"{kind}-{number}"
        folder.mkdir(parents=True)
        return folder

    def _request(self, question: str) -> Request:
        said = [exchange for exchange in self.exchanges if exchange.answer]
        questions = [*(exchange.question for exchange in said), question]
        request = Request.ask(questions[0], *([self.picture] if self.picture else []))
        for exchange, following in zip(said, questions[1:], strict=True):
            request = request.follow(exchange.answer, following)
        return request


class Sessions:
    """The sessions of a server by the names that their browsers give them; the oldest leave when there are too many."""

    def __init__(self, folder: Path, most: int = 200) -> None:
        self.folder = folder
        self.most = most
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, name: str) -> Session:
        """The session of this name, a new one if need be."""
        with self._lock:
            if name not in self._sessions:
                # The folder's own name is no one's to guess: files are read by whoever knows their path.
                self._sessions[name] = Session(name, self.folder / secrets.token_urlsafe(16))
            self._sessions.move_to_end(name)
            left = [self._sessions.popitem(last=False)[1] for _ in range(len(self._sessions) - self.most)]
        for session in left:
            session.clear()
        return self._sessions[name]

    def close(self, name: str) -> None:
        """The user has gone: stop the answer and delete the files."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session:
            session.clear()
