"""One running demo for all tests of it: the nano model, and answers on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


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
            yield from self.text
        else:
            self.scripted.counting += 1
            for number in range(2000):
                yield f"{number} "
                if self.stopped.wait(0.05):
                    break
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
    pytest.importorskip("torch")
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
