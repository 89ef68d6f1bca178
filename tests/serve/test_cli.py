"""The terminal: one question, a conversation, a folder, an address, and what it refuses."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from PIL import Image

from geochat.chat.engine import Answer, Chat, Request
from geochat.serve import cli
from geochat.serve.pictures import check_writable, fetch, open_picture, pictures_in

BOXED = "<p>two ships</p> {<10><20><40><60>|<90>}{<50><20><80><60>|<90>}"


class Parrot:
    """A stand-in for the model that answers what it is told to."""

    def __init__(self, text: str = BOXED) -> None:
        self.text = text
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
                open_picture(str(request.images[0]))
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


def test_one_question_with_a_real_model(
    tiny_model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    arguments = ["--model-path", str(tiny_model), "--image-file", str(picture), "--query", "What is this?"]
    arguments += ["--device", "cpu", "--max-new-tokens", "6", "--save-image", str(out)]
    assert cli.main(arguments) == 0
    expected = Chat.load(tiny_model, device="cpu").answer(
        [Request.ask("What is this?", picture)], max_new_tokens=6
    )
    assert capsys.readouterr().out == cli.printable(expected[0].text) + "\n"
    assert out.is_file()


def test_boxes_are_drawn(parrot: Parrot, picture: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.jpg"
    assert (
        cli.main(
            ["--model-path", "m", "--image-file", str(picture), "--query", "q", "--save-image", str(out)]
        )
        == 0
    )
    assert capsys.readouterr().err == f"2 boxes drawn in {out}\n"
    with Image.open(out) as drawn:
        assert drawn.width / drawn.height == 1.5
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 10  # the picture itself has one colour


def test_conversation_keeps_its_turns(parrot: Parrot, picture: Path, monkeypatch, capsys) -> None:
    lines = iter(["one", "two", "/new", "three", f"/image {picture}", "/image nowhere.png", "four", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["--model-path", "m", "--image-file", str(picture)]) == 0
    assert [len(request.turns) for request in parrot.requests] == [1, 3, 1, 1]
    assert [turn.text for turn in parrot.requests[1].turns] == ["<image>\none", BOXED, "two"]
    assert "error: nowhere.png: image file not found" in capsys.readouterr().err


def test_end_of_input_and_interrupt_end_it(parrot: Parrot, monkeypatch) -> None:
    for ending in (EOFError, KeyboardInterrupt):

        def stop(prompt: str, ending: type[BaseException] = ending) -> str:
            raise ending

        monkeypatch.setattr("builtins.input", stop)
        assert cli.main(["--model-path", "m"]) == 0


def test_an_interrupted_answer_stays_as_far_as_it_came(parrot: Parrot, monkeypatch) -> None:
    def interrupted(request: Request, **options):
        parrot.requests.append(request)
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(parrot, "stream", interrupted)
    lines = iter(["one", "two", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["--model-path", "m"]) == 0
    assert [turn.text for turn in parrot.requests[1].turns] == ["one", "half", "two"]


def test_a_folder_of_pictures(parrot: Parrot, picture: Path, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.open(picture).save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("none")
    arguments = ["--model-path", "m", "--image-file", str(folder), "--query", "q", "--save-image", str(out)]
    assert cli.main(arguments) == 1
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(row["image"], row["text"]) for row in rows] == [
        ("a.png", BOXED),
        ("b.jpg", BOXED),
        ("c.png", None),
    ]
    assert "not an image file" in rows[2]["error"]
    assert sorted(p.name for p in out.iterdir()) == ["a.png.png", "answers.jsonl", "b.jpg.png"]
    assert "2 of 3 pictures answered" in capsys.readouterr().err


def test_answers_cannot_steer_the_terminal(parrot: Parrot, capsys) -> None:
    parrot.text = "red\x1b[31m\x07 ship\r\u202e é 船\n"
    assert cli.main(["--model-path", "m", "--query", "q"]) == 0
    assert capsys.readouterr().out == "red[31m ship é 船\n\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-file", "nowhere.png", "--query", "q"], "nowhere.png: image file not found"),
        (["--query", "q", "--save-image", "x.png"], "--save-image needs an --image-file"),
        (["--image-file", "{picture}", "--query", "q", "--save-image", "x.what"], "must end in .png"),
        (["--image-file", "{picture}", "--query", "q", "--save-image", "no/x.png"], "there is no folder"),
        (["--image-file", "{folder}"], "is a folder: give the question with --query"),
        (["--image-file", "{empty}", "--query", "q"], "no pictures in this folder"),
        (["--image-file", "http://127.0.0.1:9/x.png", "--query", "q"], "cannot be reached"),
        (["--image-file", "{picture}", "--query", "q", "--device", "tpu"], "not available"),
        (["--image-file", "{picture}", "--query", "q"], "no checkpoint"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, picture: Path, tmp_path: Path, refused
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"{picture}": str(picture), "{folder}": str(tmp_path), "{empty}": str(tmp_path / "empty")}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert message in refused(cli.main, ["--model-path", str(tmp_path / "empty"), *arguments])


# -- addresses


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/picture.png":
            content = io.BytesIO()
            Image.new("RGB", (30, 20), "red").save(content, "PNG")
            self._send(content.getvalue())
        elif self.path == "/text":
            self._send(b"<html>")
        elif self.path == "/large":
            self._send(b"0" * 300_000)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the client goes away
                for _ in range(200):
                    self.wfile.write(b"0" * 1000)
                    time.sleep(0.1)
        else:
            self.send_error(404)

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


def test_pictures_from_an_address(server: str) -> None:
    assert open_picture(f"{server}/picture.png").size == (30, 20)
    with pytest.raises(ValueError, match=r"/text: not an image file"):
        open_picture(f"{server}/text")
    with pytest.raises(ValueError, match=r"/none: the server answers 404"):
        open_picture(f"{server}/none")


def test_downloads_are_bounded(server: str) -> None:
    with pytest.raises(ValueError, match=r"/large: larger than 0 MB"):
        fetch(f"{server}/large", max_bytes=100_000)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"/slow: not complete after 0 s"):
        fetch(f"{server}/slow", seconds=0.3)
    assert time.monotonic() - started < 10


def test_folder_listing(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.tif", ".hidden.png", "x.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.tif", "b.PNG"]
    check_writable(tmp_path / "x.JPG")
