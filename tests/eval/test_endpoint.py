"""A benchmark asked of a server: several questions under way, refusals recorded, the rest asked again later."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("openai")

from PIL import Image

from geochat.eval.files import read_json, read_rows, write_rows
from geochat.eval.run import main


class Server(http.server.ThreadingHTTPServer):
    """Says "harbour" to everything; busy once, and refuses what is in `refused`. The first two questions wait for each
    other."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refused, self.asked, self.lock = {"Scene 3?"}, [], threading.Lock()
        self.together = threading.Barrier(2, timeout=60)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": "served-model", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"][-1]["text"]
        with self.server.lock:
            self.server.asked.append(question)
            number = len(self.server.asked)
        if number <= 2:
            self.server.together.wait()
        if number == 2:
            self.send(503, {"error": {"message": "busy"}}, {"retry-after-ms": "1"})
        elif question in self.server.refused:
            self.send(400, {"error": {"message": "too long"}})
        else:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": " harbour"},
                "finish_reason": "stop",
            }
            about = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            self.send(200, about | {"choices": [choice]})

    def send(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        sizes = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (sizes | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


def test_a_benchmark_is_asked_of_a_server(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "navy").save(tmp_path / "images" / "0.png")
    common = {"image": "0.png", "task": "scene", "ground_truth": "harbour"}
    rows = [{"question_id": i, "text": f"Scene {i}?", **common} for i in range(6)]
    write_rows(tmp_path / "questions.jsonl", rows)
    arguments = ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1", "--benchmark", "nano"]
    arguments += ["--questions", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "out")]
    main([*arguments, "--batch-size", "3"])
    answers = read_rows(tmp_path / "out" / "answers.jsonl")
    assert [row["text"] for row in answers] == ["harbour"] * 3 + [None] + ["harbour"] * 2
    assert "too long" in answers[3]["error"]
    assert {(row["model"], row["decoding"]["temperature"]) for row in answers} == {("served-model", 0.0)}
    assert len(server.asked) == 7  # the busy moment's question twice
    assert "1 questions could not be asked" in capsys.readouterr().out
    server.refused.clear()
    main(arguments)
    assert server.asked[7:] == ["Scene 3?"]
    assert read_json(tmp_path / "out" / "scores.json")["tasks"]["scene"]["overall"]["accuracy"] == 1
