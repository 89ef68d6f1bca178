"""Stand-ins for the model, pictures, and one running demo for all tests of it: nano, with answers on demand."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")

import numpy as np
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


class OddPictures(NamedTuple):
    shown: list[Path]
    refused: list[Path]


@pytest.fixture
def odd_pictures(tmp_path: Path) -> OddPictures:
    """What people upload: pictures of every kind, all of them noise, and files that must be refused."""
    folder = tmp_path / "odd"
    folder.mkdir()

    def save(name: str, image: Image.Image, **options: Any) -> Path:
        image.save(folder / name, **options)
        return folder / name

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    noise = Image.effect_noise((50, 40), 60)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    shown = [
        save("cmyk.jpg", noise.convert("CMYK")),
        save("palette.png", noise.convert("P")),
        save("transparent.png", noise.convert("RGBA")),
        save("grey.png", noise),
        save("one-bit.png", noise.convert("1")),
        save("gif.gif", noise.convert("P")),
        save("sideways.jpg", noise, exif=sideways),
        save("tall.png", Image.effect_noise((2, 30_000), 60)),
        save("wide.png", Image.effect_noise((30_000, 100), 60)),
    ]
    whole = (folder / "palette.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + whole[24:29]
    refused = [
        write("empty.png", b""),
        write("cut.png", whole[: len(whole) // 2]),
        write("text.png", b"<svg onload=alert(1)>"),
        write("bomb.png", whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]),
        save("deep.png", Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50))),
        save("deep.tif", Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50))),
    ]
    return OddPictures(shown, refused)


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    parrot = Parrot()
    monkeypatch.setattr(cli, "load_chat", lambda arguments: parrot)
    return parrot


class Line:
    """A ticket whose answer was decided before."""

    def __init__(self, kind: str, text: str, scripted: Scripted) -> None:
        self.kind, self.text, self.scripted = kind, text, scripted
        self.stopped = threading.Event()
        self.before = 3 if kind == "wait" else 0

    @property
    def position(self) -> int:
        """The line moves on with every look."""
        self.before = max(0, self.before - 1)
        return self.before

    def cancel(self) -> None:
        self.stopped.set()

    def __iter__(self) -> Iterator[str]:
        if self.kind == "fail":
            raise RuntimeError("the worker died")
        if self.kind in ("say", "wait"):
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
    """The real service, but for questions that begin with "say:", "wait:", "count:" or "fail:"."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self.counting = 0

    def submit(self, request: Any, **options: Any) -> Any:
        kind, colon, text = request.turns[-1].text.removeprefix("<image>\n").partition(": ")
        if colon and kind in ("say", "wait", "count", "fail"):
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts the demo as its users do: the process, and its address. Its files lie in tmp_path / "tmp"."""
    pytest.importorskip("gradio", reason="the serve extra (gradio) is not installed")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    processes = []

    def run(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "geochat.serve.gradio_web_server", "--port", "0", *arguments]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        processes.append(process)
        assert process.stdout
        said = re.search(r"http://\S+", process.stdout.readline())
        assert said, process.communicate()
        return process, said[0]

    yield run
    for process in processes:
        process.kill()
        process.wait()
