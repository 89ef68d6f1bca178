"""The running demo from outside: a conversation by program, many users, and what it refuses."""

from __future__ import annotations

import argparse
import gc
import html
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("gradio_client", reason="gradio_client is not installed")

import gradio_client
import httpx
from PIL import Image, ImageOps

from geochat.chat.engine import Request
from geochat.data.synthetic import draw_scene
from geochat.serve import gradio_web_server

QUESTIONS = [
    "[refer] Give me the location of <p> ship </p>",
    "How many ships are there in the image?\nAnswer the question using a single word or phrase.",
    "[grounding] Describe the image in detail.",
    "Is there a plane in the image?\nAnswer the question using a single word or phrase.",
    "[refer] Where is <p> vehicle </p>",
]


class Said(NamedTuple):
    texts: list[str]
    status: str
    picture: Path | None
    geojson: Path | None


class User:
    """A program that talks with the demo as a browser does."""

    def __init__(self, url: str) -> None:
        self.client = gradio_client.Client(url, verbose=False)

    def show(self, file: Path) -> Said:
        return self._said(self.client.predict(gradio_client.handle_file(str(file)), api_name="/show"))

    def ask(self, question: str, tokens: int = 100) -> Said:
        return self._said(self.client.predict(question, tokens, 0, 1, api_name="/ask"))

    def _said(self, result: tuple[Any, ...]) -> Said:
        chat, _, status, picture, *_, geojson = result
        texts = [html.unescape("".join(part["text"] for part in message["content"])) for message in chat]
        value = geojson.get("value") if isinstance(geojson, dict) else geojson
        return Said(
            texts,
            status,
            Path(picture) if isinstance(picture, str) else None,
            Path(value) if value and Path(value).is_file() else None,
        )

    def answer(self, question: str) -> str:
        said = self.ask(question)
        assert said.status == ""
        assert said.geojson
        return json.loads(said.geojson.read_text())["answer"]


@pytest.fixture
def user(demo: Any) -> User:
    return User(demo.url)


def alone(demo: Any, picture: Path, questions: list[str]) -> list[str]:
    """What the model says when nobody else asks."""
    answers: list[str] = []
    request = Request.ask(questions[0], picture)
    for number, question in enumerate(questions):
        if number:
            request = request.follow(answers[-1], question)
        answers.append(demo.chat.answer([request], max_new_tokens=100)[0].text)
    return answers


def test_a_program_has_a_conversation_about_a_picture(user: User, demo: Any) -> None:
    assert user.show(demo.scene).status == "168 × 168 pixels"
    assert [user.answer(question) for question in QUESTIONS[:3]] == alone(demo, demo.scene, QUESTIONS[:3])
    said = user.ask(QUESTIONS[3])
    assert said.texts[::2] == QUESTIONS[:4]
    assert user._said(user.client.predict(100, 0, 1, api_name="/regenerate")).texts == said.texts
    assert user._said(user.client.predict(api_name="/clear")).texts == []
    assert user.answer(QUESTIONS[0]) == alone(demo, demo.scene, QUESTIONS[:1])[0]


def test_users_at_the_same_time_get_their_own_answers(demo: Any, tmp_path: Path) -> None:
    """benchmarks/demo_load.py does it with twenty."""
    users, turns = 4, 2
    pictures = [tmp_path / f"{number}.png" for number in range(users)]
    for number, picture in enumerate(pictures):
        draw_scene(1000 + number).image.save(picture)
    questions = [[QUESTIONS[(n + turn) % len(QUESTIONS)] for turn in range(turns)] for n in range(users)]

    def talk(number: int) -> list[str]:
        user = User(demo.url)
        user.show(pictures[number])
        return [user.answer(question) for question in questions[number]]

    with ThreadPoolExecutor(users) as pool:
        told = list(pool.map(talk, range(users)))
    assert told == [alone(demo, pictures[n], questions[n]) for n in range(users)]


def test_who_waits_is_told_how_many_come_before(user: User) -> None:
    answer = user.client.submit("wait: here it is", 100, 0, 1, api_name="/ask")
    answer.result()
    statuses = [user._said(output).status for output in answer.outputs()]
    assert statuses[:2] == ["waiting, 2 before you", "waiting, 1 before you"]
    assert statuses[-1] == ""
    assert user._said(answer.result()).texts == ["wait: here it is", "here it is"]


def test_an_error_ends_one_question_and_not_the_server(user: User, demo: Any) -> None:
    failing = User(demo.url)
    user.show(demo.scene)
    said = failing.ask("fail: now")
    assert said.texts == []
    assert said.status.startswith("error: the model failed on this question")
    assert "worker died" not in said.status
    assert failing.ask("say: well").texts == ["say: well", "well"]
    assert user.answer(QUESTIONS[1]) == alone(demo, demo.scene, QUESTIONS[1:2])[0]


@pytest.mark.parametrize(
    ("question", "status"),
    [("", "error: write a question first"), ("ship " * 30_000, "error: "), ("<image> what?", "error: ")],
    ids=["empty", "long", "mark"],
)
def test_questions_that_cannot_be_asked_get_one_line(user: User, question: str, status: str) -> None:
    said = user.ask(question)
    assert said.texts == []
    assert said.status.startswith(status)
    assert "\n" not in said.status
    assert "failed" not in said.status


def test_questions_of_any_characters_are_answered(user: User) -> None:
    question = "\u202e船 é 🛰️ \x07\x00 \u200d {<1> </s> <p> ```$$\\frac$$ ﷽ " + "a\u0301" * 50
    said = user.ask(question, tokens=5)
    assert said.status == ""
    assert len(said.texts) == 2


def test_every_file_is_shown_or_refused_in_one_line(user: User, demo: Any, odd_pictures: Any) -> None:
    for file in odd_pictures.shown:
        said = user.show(file)
        with Image.open(file) as stored:
            assert said.status == "{} × {} pixels".format(*ImageOps.exif_transpose(stored).size), file.name
        assert said.picture
        with Image.open(said.picture) as drawn:
            assert len(drawn.convert("L").getcolors(1 << 24)) > 20, file.name
    for file in odd_pictures.refused:
        said = user.show(file)
        assert said.status.startswith(f"error: {file.name}: ")
        assert "\n" not in said.status
        assert str(demo.folder) not in said.status
    user.show(demo.scene)
    assert user.answer(QUESTIONS[1]) == alone(demo, demo.scene, QUESTIONS[1:2])[0]


# -- what a browser must not get


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        str(gradio_web_server.NANO / "config.json"),
        str(Path(gradio_web_server.__file__)),
        "http://127.0.0.1:9/x",
        "HTTPS://example.org/x.png",
        "file:///etc/passwd",
    ],
)
def test_no_path_outside_and_no_address_is_read(demo: Any, path: str) -> None:
    for route in (
        "/gradio_api/file=",
        "/file=",
        "/gradio_api/file/",
        "/gradio_api/proxy=",
        "/static/",
        "/assets/",
    ):
        answer = httpx.get(f"{demo.url}{route}{path}", follow_redirects=True)
        assert answer.status_code >= 400, f"{route}{path}"
        assert b"root:" not in answer.content


def test_no_folder_is_listed(user: User, demo: Any) -> None:
    """A file of a session is read by whoever knows its path, which nobody can guess."""
    user.show(demo.scene)
    for folder in (demo.folder, demo.folder / "sessions", *(demo.folder / "sessions").iterdir()):
        assert httpx.get(f"{demo.url}/gradio_api/file={folder}").status_code >= 400


def test_only_uploaded_files_are_taken_as_pictures(user: User) -> None:
    """A client may name any path or address in place of a file that it has uploaded."""
    session = {"session_hash": "someone", "trigger_id": None}
    fn_index = next(d["id"] for d in user.client.config["dependencies"] if d["api_name"] == "show")
    for path in ("/etc/hostname", str(gradio_web_server.NANO / "config.json"), "http://127.0.0.1:9/x.png"):
        file = {"path": path, "url": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file], "fn_index": fn_index, **session}
        api = user.client.src.rstrip("/") + "/gradio_api/queue"
        assert httpx.post(f"{api}/join", json=body).status_code == 200
        events = httpx.get(f"{api}/data", params={"session_hash": "someone"}, timeout=60).text
        assert '"success":false' in events
        assert "pixels" not in events


def test_an_address_in_place_of_a_file_is_not_fetched(demo: Any) -> None:
    import asyncio

    from gradio import processing_utils

    with pytest.raises(ValueError, match="opens no addresses"):
        asyncio.run(processing_utils.async_ssrf_protected_download("http://1.1.1.1/x", str(demo.folder)))


def test_the_page_may_load_from_this_server_alone(demo: Any) -> None:
    answer = httpx.get(demo.url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    config = httpx.get(f"{demo.url}/config").json()
    assert not config["analytics_enabled"]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert httpx.get(f"{demo.url}/monitoring").status_code >= 400 or not config.get("enable_monitoring")


def test_a_password_is_asked_for(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"]
    )  # the other server's, set back at the end
    blocks = gradio_web_server.launch(
        demo.service, tmp_path / "files", "127.0.0.1", None, ("me", "secret"), "x"
    )
    try:
        url = blocks.local_url.rstrip("/")
        assert httpx.get(f"{url}/config").status_code == 401
        for password, status in (("wrong", 400), ("secret", 200)):
            login = httpx.post(f"{url}/login", data={"username": "me", "password": password})
            assert login.status_code == status
    finally:
        blocks.close(verbose=False)


# -- the command


def test_the_command_starts_nano_and_serves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[Any, ...]] = []

    class Blocks:
        local_url = "http://127.0.0.1:7860/"

        def block_thread(self) -> None:
            pass

        def close(self, verbose: bool) -> None:
            started.append(("closed",))

    def launch(service: Any, folder: Path, *rest: Any) -> Blocks:
        started.append((folder.is_dir(), *rest))
        services.append(service)
        return Blocks()

    services: list[Any] = []
    monkeypatch.setattr(gradio_web_server, "launch", launch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    assert gradio_web_server.main(["--device", "cpu", "--auth", "me:a:b"]) == 0
    assert started == [(True, "127.0.0.1", 7860, ("me", "a:b"), "nano"), ("closed",)]
    with pytest.raises(ValueError, match="closed"):
        services[0].submit(Request.ask("anyone?"))
    assert "http://127.0.0.1:7860/" in capsys.readouterr().out


def test_refusals_of_the_command_are_one_line(
    demo: Any, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    main = gradio_web_server.main
    assert "no checkpoint" in refused(main, ["--model-path", str(tmp_path)])
    port = demo.url.rsplit(":", 1)[1]
    assert port in refused(main, ["--port", port, "--device", "cpu"])
    for text in ("me", ":x", "me:"):
        with pytest.raises(argparse.ArgumentTypeError, match="user:password"):
            gradio_web_server.user_and_password(text)


@pytest.mark.parametrize(
    "ending",
    [
        signal.SIGTERM,
        pytest.param(
            signal.SIGINT,
            marks=pytest.mark.skipif(
                not os.environ.get("GEOCHAT_ALL_TESTS"), reason="starts a server: set GEOCHAT_ALL_TESTS=1"
            ),
        ),
    ],
)
def test_a_signal_ends_the_command_and_deletes_what_users_showed(
    start: Callable[..., Any], demo: Any, tmp_path: Path, ending: signal.Signals
) -> None:
    process, url = start("--device", "cpu")
    user = User(url)
    user.show(demo.scene)
    assert list((tmp_path / "tmp").glob("geochat-demo-*/sessions/*/picture"))
    answer = user.client.submit("[grounding] Describe the image in detail.", 2048, 2, 1, api_name="/ask")
    while not answer.outputs():  # it is being written
        answer.done() and pytest.fail("the answer was complete too soon")
        threading.Event().wait(0.01)
    process.send_signal(ending)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in errors
    assert list((tmp_path / "tmp").glob("geochat-*")) == []


def test_files_of_those_who_leave_are_deleted(demo: Any) -> None:
    sessions = demo.folder / "sessions"
    before = set(sessions.iterdir())
    user = User(demo.url)
    user.show(demo.scene)
    new = set(sessions.iterdir()) - before
    assert len(new) == 1
    user.client.close()
    del user
    gc.collect()
    done = threading.Event()
    for _ in range(300):
        if not new & set(sessions.iterdir()):
            return
        done.wait(0.1)
    pytest.fail(f"{new} is still there")
