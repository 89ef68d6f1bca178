"""Stand-ins for the model, a picture, and one running demo for all tests of it: nano, with answers on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")

from PIL import Image

from geochat.chat.engine import Answer, Request
from geochat.data.images import open_image
from geochat.serve import cli


class Parrot:
    """Answers what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.text = "<p>two ships</p> {<10><20><40><60>|<90>}{<50><20><80><60>|<90>}"
        self.requests: list[Request] = []

    def stream(self, request: Request, **options):
        self.requests.append(request)
        for word in self.text.split(" "):
            yield word if word == self.text.split(" ")[0] else f" {word}"

    def answer_each(self, requests, **options):
        self.requests += requests
        results: list = []
        for request in requests:
            try:
                open_image(request.images[0])
                results.append(Answer(self.text, (), True))
            except ValueError as error:
                results.append(error)
        return results


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "scene.png"
    Image.new("RGB", (120, 80), (70, 90, 60)).save(file)
    return file


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    parrot = Parrot()
    monkeypatch.setattr(cli, "load_chat", lambda arguments: parrot)
    return parrot


class Line:
    """A ticket whose answer was decided before."""

    position = 0

    def __init__(self, kind: str, text: str, scripted: Scripted) -> None:
        self.kind, self.text, self.scripted = kind, text, scripted
        self.stopped = threading.Event()

    def cancel(self) -> None:
        self.stopped.set()

    def __iter__(self) -> Iterator[str]:
        if self.kind == "fail":
            raise RuntimeError("the worker died")
        if self.kind == "say":
            yield from (self.text[:10], self.text[10:])
        else:
            self.scripted.counting += 1
            try:
                for number in range(2000):
                    yield f"{number} "
                    if self.stopped.wait(0.05):
                        break
            finally:  # who leaves closes the iterator in the middle
                self.scripted.counting -= 1


class Scripted:
    """The real service, but for questions that begin with "say:", "count:" or "fail:"."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self.counting = 0

    def submit(self, request: Any, **options: Any) -> Any:
        kind, colon, text = request.turns[-1].text.removeprefix("<image>\n").partition(": ")
        if colon and kind in ("say", "count", "fail"):
            return Line(kind, text, self)
        return self.service.submit(request, **options)


class Demo(NamedTuple):
    url: str
    chat: Any
    folder: Path
    service: Scripted
    scene: Path
    """A picture of a harbour."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    pytest.importorskip("gradio", reason="the serve extra (gradio) is not installed")
    from geochat.chat.engine import Chat
    from geochat.chat.service import Service
    from geochat.data.synthetic import draw_scene
    from geochat.serve.gradio_web_server import NANO, launch

    folder = tmp_path_factory.mktemp("demo")
    chat = Chat.load(NANO, device="cpu")
    service = Scripted(Service(chat))
    scene = folder / "harbour.png"
    draw_scene(7, name="harbour").image.save(scene)
    blocks = launch(service, folder / "files", "127.0.0.1", None, None, "nano")
    yield Demo(blocks.local_url.rstrip("/"), chat, folder / "files", service, scene)
    blocks.close(verbose=False)
