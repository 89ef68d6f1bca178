"""The terminal: one question, a conversation and its commands, an address, and what it refuses."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from PIL import Image

from geochat.chat.engine import Chat, Request
from geochat.data.sample import Sample
from geochat.data.verify import main as verify
from geochat.serve import cli
from geochat.serve.conversation import printable
from geochat.serve.history import history_file, prompt_history
from geochat.serve.pictures import check_writable, fetch, gather, open_picture, pictures_in


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
    assert capsys.readouterr().out == printable(expected[0].text) + "\n"
    assert out.is_file()


def test_boxes_are_drawn(parrot, picture: Path, tmp_path: Path, capsys) -> None:
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


@pytest.fixture
def type_lines(monkeypatch):
    """Answers input() with these lines; an exception among them is raised. Then the input ends."""

    def prepare(*lines: str | BaseException) -> None:
        left = iter(lines)

        def typed(prompt: str) -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", typed)

    return prepare


def test_conversation_keeps_its_turns(parrot, picture: Path, type_lines, capsys) -> None:
    type_lines("one", "two", "/reset", "three", f"/image {picture}", "/image nowhere.png", "four", "", "five")
    assert cli.main(["--model-path", "m", "--image-file", str(picture)]) == 0
    assert [len(request.turns) for request in parrot.requests] == [1, 3, 1, 1]
    assert [turn.text for turn in parrot.requests[1].turns] == ["<image>\none", parrot.text, "two"]
    assert "error: nowhere.png: image file not found" in capsys.readouterr().err


def test_several_lines_are_one_question(parrot, type_lines) -> None:
    type_lines(
        "one \\", "two\\", "three", '"""four', "", " five \\", 'six"""', '"""seven"""', "/help me\\", "x"
    )
    assert cli.main(["--model-path", "m"]) == 0
    asked = [request.turns[-1].text for request in parrot.requests]
    assert asked == ["one \ntwo\nthree", "four\n\n five \\\nsix", "seven"]


@pytest.mark.parametrize("typed", [False, True])
def test_the_end_of_input_ends_it(parrot, type_lines, monkeypatch, typed: bool) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: typed)
    type_lines("one", EOFError(), "two")
    assert cli.main(["--model-path", "m", "--no-history"]) == 0
    assert len(parrot.requests) == 1


def test_an_interrupt_at_the_prompt_ends_a_pipe_only(parrot, type_lines, monkeypatch, capsys) -> None:
    for typed, answers in ((False, 1), (True, 3)):
        monkeypatch.setattr(sys.stdin, "isatty", lambda typed=typed: typed)
        type_lines("one", KeyboardInterrupt(), "two")
        assert cli.main(["--model-path", "m", "--no-history"]) == 0
        assert len(parrot.requests) == answers
    assert "an empty line ends" in capsys.readouterr().err


def test_an_interrupt_elsewhere_ends_with_one_line(parrot, monkeypatch, capsys) -> None:
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_chat", interrupted)
    assert cli.main(["--model-path", "m"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_unknown_commands_are_not_asked(parrot, type_lines, capsys) -> None:
    type_lines("/new", "/image", "/save", "/reset now", "/help")
    assert cli.main(["--model-path", "m"]) == 0
    said = capsys.readouterr().err
    assert said.count("error: no command /") == 4
    assert "/boxes [F.png]" in said
    assert not parrot.requests


def test_boxes_of_the_last_answer(
    parrot, picture: Path, type_lines, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    type_lines("/boxes", "q", "/boxes", "/boxes other.jpg", "/boxes no/x.png", "/reset", "/boxes")
    assert cli.main(["--model-path", "m", "--image-file", str(picture)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("two ships\t{<10><20><40><60>|<90>}\t(")
    assert len(said.out.splitlines()) == 5
    assert said.err.count("error: the last answer has no boxes") == 2
    assert "there is no folder" in said.err
    assert "2 boxes in scene-boxes.png and scene-boxes.geojson" in said.err
    assert Image.open("other.jpg").size[0] == 720
    collection = json.loads(Path("scene-boxes.geojson").read_text())
    assert [feature["properties"]["phrase"] for feature in collection["features"]] == ["two ships"] * 2
    corners = collection["features"][0]["geometry"]["coordinates"][0]
    assert {(round(x), round(y)) for x, y in corners} == {(14, 14), (46, 14), (14, 50), (46, 50)}


def test_a_saved_conversation_is_an_instruction_file(
    parrot, picture: Path, type_lines, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "said.json"
    type_lines(f"/save {out}", "one", "two", f"/save {out}")
    assert cli.main(["--model-path", "m", "--image-file", str(picture)]) == 0
    assert "error: nothing has been said" in capsys.readouterr().err
    sample = Sample.from_record(json.loads(out.read_text())[0])
    assert sample.images == (str(picture),)
    assert [turn.text for turn in sample.turns] == ["<image>\none", parrot.text, "two", parrot.text]
    assert not verify([str(out), "--image-folder", "/"])


def test_history_is_kept_between_sessions(tmp_path: Path, monkeypatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with prompt_history():
        readline.clear_history()
        readline.add_history("how many ships?")
    readline.clear_history()
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    with prompt_history():
        assert readline.get_history_item(1) == "how many ships?"
    readline.clear_history()
    history_file().write_bytes(b"\xff\xfe")
    with prompt_history():
        pass


def test_no_history_where_nobody_types(parrot, type_lines, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    type_lines("one")
    assert cli.main(["--model-path", "m"]) == 0
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    type_lines("one")
    assert cli.main(["--model-path", "m", "--no-history"]) == 0
    assert not (tmp_path / "state").exists()


def test_an_interrupted_answer_stays_as_far_as_it_came(parrot, type_lines, monkeypatch) -> None:
    def interrupted(request: Request, **options):
        parrot.requests.append(request)
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(parrot, "stream", interrupted)
    type_lines("one", "two")
    assert cli.main(["--model-path", "m"]) == 0
    assert [turn.text for turn in parrot.requests[1].turns] == ["one", "half", "two"]


def test_answers_cannot_steer_the_terminal(parrot, capsys) -> None:
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
        (["--image-file", "{folder}"], "is a folder: name it with --images"),
        (["--image-file", "{picture}", "--output", "x"], "--output belongs to --images or --tile"),
        (["--images", "{empty}", "--prompt", "q", "--output", "x"], "no pictures in this folder"),
        (["--images", "{folder}", "--prompt", "q"], "--images needs a question (--prompt) and a folder"),
        (["--images", "{folder}", "--output", "x"], "--images needs a question (--prompt) and a folder"),
        (
            ["--images", "{folder}", "--prompt", "q", "--output", "{picture}"],
            "a file; --output names a folder",
        ),
        (["--images", "{folder}", "--image-file", "x"], "--images goes with neither"),
        (["--images", "nowhere.txt", "--prompt", "q", "--output", "x"], "not a readable list"),
        (["--tile", "--prompt", "q", "--output", "x"], "--tile needs a scene on disk"),
        (["--tile", "--image-file", "{picture}", "--output", "x"], "--tile needs a question"),
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
        elif self.path.startswith("/to-"):
            self.send_response(302)
            target = {"/to-picture": "/picture.png", "/to-file": "file:///etc/passwd", "/to-ftp": "ftp://h/x"}
            self.send_header("Location", target.get(self.path, self.path))
            self.end_headers()
        elif self.path == "/empty":
            self._send(b"")
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
    with pytest.raises(ValueError, match=r"/empty: the file is empty"):
        open_picture(f"{server}/empty")


def test_redirects_lead_to_no_other_scheme(server: str) -> None:
    assert open_picture(f"{server}/to-picture").size == (30, 20)
    for name in ("to-file", "to-ftp", "to-self"):
        with pytest.raises(ValueError, match=rf"/{name}: "):
            open_picture(f"{server}/{name}")


def test_downloads_are_bounded(server: str) -> None:
    with pytest.raises(ValueError, match=r"/large: larger than 0 MB"):
        fetch(f"{server}/large", max_bytes=100_000)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"/slow: not complete after 0 s"):
        fetch(f"{server}/slow", seconds=0.3)
    assert time.monotonic() - started < 10


def test_folder_listing(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.tif", ".hidden.png", "x.txt", "y.eps", "z.pdf"):
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.tif", "b.PNG"]
    check_writable(tmp_path / "x.JPG")


def test_pictures_are_gathered_from_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").touch()
    (tmp_path / "list.txt").write_text("folder/a.png\n\n b c.jpg \n", encoding="utf-8-sig")
    (tmp_path / "empty.txt").touch()
    found = gather([folder, tmp_path / "list.txt", tmp_path / "d.tif"])
    assert found == [folder / "a.png", tmp_path / "b c.jpg", tmp_path / "d.tif"]
    with pytest.raises(ValueError, match="no pictures in this list"):
        gather([tmp_path / "empty.txt"])
    with pytest.raises(ValueError, match=r"a\.png has the same name"):
        gather([folder, tmp_path / "a.png"])
