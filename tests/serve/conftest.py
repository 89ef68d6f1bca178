"""A stand-in for the model, and a picture."""

from __future__ import annotations

from pathlib import Path

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
