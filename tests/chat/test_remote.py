"""A model behind an OpenAI-compatible server: what is sent, what comes back, and what goes wrong on the way."""

from __future__ import annotations

import argparse
import base64
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("openai")

from PIL import Image

from geochat.chat.arguments import add_model_arguments, load_chat
from geochat.chat.engine import Chat, Request
from geochat.chat.remote import RemoteChat

Reply = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server(http.server.ThreadingHTTPServer):
    """Gives the replies that it was told to, in turn, the last one for ever; keeps what it was asked."""

    def __init__(self, *replies: Reply, models: tuple[str, ...] = ("harbour",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.models = list(replies), models
        self.asked: list[dict] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        send(
            self, 200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.server.models]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
            reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        try:
            reply(self)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def log_message(self, *args: object) -> None:
        pass


def send(handler: http.server.BaseHTTPRequestHandler, status: int, body: dict, **headers: str) -> None:
    content = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **headers,
    }.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def say(text: str, reason: str = "stop", seconds: float = 0.0) -> Reply:
    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        send(
            handler,
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]},
        )

    return reply


def fail(status: int, **headers: str) -> Reply:
    return lambda handler: send(handler, status, {"error": {"message": f"code {status}"}}, **headers)


def pieces(*texts: str, reason: str | None = "stop", cut: bool = False) -> Reply:
    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        if cut:
            handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for i, text in enumerate(texts):
            end = reason if i == len(texts) - 1 else None
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": end}
            chunk = {
                "id": "1",
                "object": "chat.completion.chunk",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
            handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        handler.close_connection = True

    return reply


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*replies: Reply, **options: tuple[str, ...]) -> Server:
        servers.append(Server(*replies, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between attempts, shortened."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)


QUICK = Request.ask("What?")
NANO = Path(__file__).resolve().parents[2] / "playground" / "nano"


def test_turns_and_pictures_become_messages(serve, tmp_path: Path) -> None:
    server = serve(say("  two ships \n"))
    picture = Image.new("RGB", (31, 17), (9, 8, 7))
    picture.putpixel((3, 4), (200, 0, 0))
    picture.save(tmp_path / "a.png")
    request = Request.ask("What differs?", tmp_path / "a.png", picture).follow("nothing", "Sure?")
    chat = RemoteChat(server.url)
    answer = chat.answer([request], max_new_tokens=7)[0]
    assert (answer.text, answer.finished, answer.token_ids) == ("two ships", True, ())
    (asked,) = server.asked
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("harbour", 7, 0.0)
    first, second, third = asked["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "image_url", "text"]
    assert first["content"][2]["text"] == "What differs?"
    for part in first["content"][:2]:
        content = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(content)).tobytes() == picture.tobytes()
    assert (second, third) == (
        {"role": "assistant", "content": "nothing"},
        {"role": "user", "content": "Sure?"},
    )


def test_answers_keep_their_order_and_go_out_together(serve) -> None:
    server = serve(say("yes", seconds=0.05))
    requests = [Request.ask(f"Question {i}") for i in range(9)]
    results = RemoteChat(server.url).answer_each(requests, batch_size=3)
    assert [result.text for result in results] == ["yes"] * 9
    assert server.most == 3
    assert sorted(asked["messages"][0]["content"] for asked in server.asked) == [
        f"Question {i}" for i in range(9)
    ]


def test_sampling_is_passed_on(serve) -> None:
    server = serve(say("a", reason="length"))
    chat = RemoteChat(server.url)
    answers = chat.answer([QUICK, QUICK], temperature=0.7, top_p=0.9, seed=5)
    assert not any(answer.finished for answer in answers)
    assert sorted(asked["seed"] for asked in server.asked) == [5, 6]
    assert {(asked["temperature"], asked["top_p"]) for asked in server.asked} == {(0.7, 0.9)}


def test_a_busy_or_failing_server_is_asked_again(serve) -> None:
    server = serve(fail(429, Retry_After="0"), fail(500), fail(503), say("at last"))
    assert RemoteChat(server.url).answer([QUICK])[0].text == "at last"
    assert len(server.asked) == 4


def test_what_the_server_refuses_is_that_requests_error(serve, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    server = serve(fail(400), say("fine"))
    chat = RemoteChat(server.url)
    requests = [QUICK, QUICK, Request.ask("a", tmp_path / "bad.png"), Request.ask("a", "nowhere.png")]
    refused, fine, unread, missing = chat.answer_each(requests, batch_size=1)
    assert isinstance(refused, ValueError)
    assert "code 400" in str(refused)
    assert fine.text == "fine"
    assert str(unread) == f"{tmp_path / 'bad.png'}: not an image file"
    assert "nowhere.png: cannot be read" in str(missing)
    server.replies.insert(0, fail(422))
    with pytest.raises(ValueError, match=r"request 0: .*code 422"):
        chat.answer([QUICK])


def test_a_slow_server_is_not_waited_for(serve) -> None:
    server = serve(say("late", seconds=1.0))
    (result,) = RemoteChat(server.url, seconds=0.1, retries=1).answer_each([QUICK])
    assert "no answer in time" in str(result)
    assert len(server.asked) == 2


def test_a_server_that_is_gone_or_closed_ends_the_run(serve) -> None:
    server = serve(fail(401))
    chat = RemoteChat(server.url, retries=0)
    with pytest.raises(ConnectionError, match="code 401"):
        chat.answer_each([QUICK])
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        chat.answer_each([QUICK])
    with pytest.raises(ValueError, match="cannot be reached"):
        RemoteChat(server.url, retries=0)
    with pytest.raises(ValueError, match="not an address"):
        RemoteChat("localhost:8000")


def test_a_stream_is_the_answer_in_pieces(serve) -> None:
    server = serve(pieces(" ", " two", " ", "ships", " \n", " "))
    assert list(RemoteChat(server.url).stream(QUICK)) == ["two", " ships"]
    assert server.asked[0]["stream"] is True


@pytest.mark.parametrize(
    "broken", [pieces("two", " shi", reason=None), pieces("two", " shi", reason=None, cut=True)]
)
def test_a_stream_that_breaks_off_is_no_answer(serve, broken: Reply) -> None:
    with pytest.raises((ValueError, ConnectionError), match=r"broke off|cannot be reached"):
        list(RemoteChat(serve(broken).url).stream(QUICK))


def test_which_model(serve) -> None:
    server = serve(say("a"), models=("one", "two"))
    with pytest.raises(ValueError, match=r"--endpoint-model; the server lists one, two"):
        RemoteChat(server.url)
    assert RemoteChat(server.url, "two").model == "two"


def test_options(serve, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    url = serve(say("a")).url
    assert load_chat(parser.parse_args(["--endpoint", url])).model == "harbour"
    with pytest.raises(ValueError, match="--image-mode, --load-4bit: for a model of this machine"):
        load_chat(parser.parse_args(["--endpoint", url, "--load-4bit", "--image-mode", "crop"]))
    for words in ([], ["--endpoint", url, "--model-path", "m"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)


@pytest.mark.slow
def test_answers_of_transformers_serve_are_ours(
    transformers_serve: Callable[[Path], str], requests: list[Request]
) -> None:
    """A real server, on another path through transformers: its processor, its template, its `generate`."""
    chat = RemoteChat(transformers_serve(NANO), str(NANO))
    expected = Chat.load(NANO, device="cpu").answer(requests, max_new_tokens=10)
    found = chat.answer(requests, max_new_tokens=10, batch_size=2)
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    for request, answer in zip(requests[:3], expected, strict=False):
        assert "".join(chat.stream(request, max_new_tokens=10)) == answer.text
