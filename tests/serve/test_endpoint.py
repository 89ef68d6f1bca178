"""A model of ours behind `transformers serve`: the official client and our own commands hold a conversation with it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("openai")

from openai import OpenAI

from geochat.chat.engine import Chat, Request
from geochat.data.rows import read_rows
from geochat.serve import cli

pytestmark = pytest.mark.slow
QUESTIONS = ("What is this?", "And what else?")


@pytest.fixture(scope="module")
def endpoint(transformers_serve: Callable[[Path], str], tiny_model: Path) -> str:
    return transformers_serve(tiny_model)


@pytest.fixture
def expected(tiny_model: Path, picture: Path) -> list[str]:
    """What the model answers to the two questions on this machine."""
    chat = Chat.load(tiny_model, device="cpu")
    first = Request.ask(QUESTIONS[0], picture)
    said = chat.answer([first], max_new_tokens=8)[0].text
    return [said, chat.answer([first.follow(said, QUESTIONS[1])], max_new_tokens=8)[0].text]


def test_the_official_client(endpoint: str, tiny_model: Path, picture: Path, expected: list[str]) -> None:
    client = OpenAI(base_url=endpoint, api_key="none")
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    messages: list = []
    said = []
    for question in QUESTIONS:
        parts: list = [{"type": "text", "text": question}]
        if not messages:
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": "user", "content": parts})
        answer = client.chat.completions.create(
            model=str(tiny_model), messages=messages, max_tokens=8, temperature=0
        )
        said.append(answer.choices[0].message.content)
        messages.append({"role": "assistant", "content": said[-1]})
    assert [text.strip() for text in said] == expected


def test_the_terminal(endpoint: str, tiny_model: Path, picture: Path, expected, monkeypatch, capsys) -> None:
    lines = iter(QUESTIONS)

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    arguments = ["--endpoint", endpoint, "--endpoint-model", str(tiny_model), "--max-new-tokens", "8"]
    assert cli.main([*arguments, "--image-file", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_the_web_demo(endpoint: str, tiny_model: Path, picture: Path, expected, start) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    _, url = start("--endpoint", endpoint, "--endpoint-model", str(tiny_model))
    client = gradio_client.Client(url, verbose=False)
    client.predict(gradio_client.handle_file(str(picture)), api_name="/show")
    for question, text in zip(QUESTIONS, expected, strict=True):
        _, _, status, *_, geojson = client.predict(question, 8, 0, 1, api_name="/ask")
        assert status == ""
        assert json.loads(Path(geojson["value"]).read_text())["answer"] == text


def test_folders_and_scenes(endpoint: str, tiny_model: Path, picture: Path, tmp_path: Path, expected) -> None:
    arguments = ["--endpoint", endpoint, "--endpoint-model", str(tiny_model), "--max-new-tokens", "8"]
    arguments += ["--prompt", QUESTIONS[0]]
    assert cli.main([*arguments, "--images", str(picture), "--output", str(tmp_path / "many")]) == 0
    assert [row["text"] for row in read_rows(tmp_path / "many" / "answers.jsonl")] == expected[:1]
    pytest.importorskip("rasterio")
    scene = [*arguments, "--image-file", str(picture), "--output", str(tmp_path / "scene")]
    assert cli.main([*scene, "--tile", "80"]) == 0
    assert json.loads((tmp_path / "scene" / "boxes.geojson").read_text())["features"] == []
    with pytest.raises(SystemExit):
        cli.main([*scene, "--tile"])
