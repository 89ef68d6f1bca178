"""One question on many pictures: rows, drawings, failures, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from geochat.chat.engine import Chat, Request
from geochat.data.boxes import parse_boxes
from geochat.data.rows import read_rows
from geochat.serve import batch, cli


@pytest.fixture
def folder(tmp_path: Path, picture: Path) -> Path:
    """Two pictures, a damaged one and a file of another kind."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.open(picture).save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture
def ask(folder: Path, tmp_path: Path):
    def run(*more: str, prompt: str = "q") -> int:
        output = str(tmp_path / "out")
        return cli.main(
            ["--model-path", "m", "--images", str(folder), "--prompt", prompt, "--output", output, *more]
        )

    return run


def test_rows_drawings_and_failures(parrot, ask, tmp_path: Path, capsys) -> None:
    assert ask() == 1
    out = tmp_path / "out"
    rows = read_rows(out / "answers.jsonl")
    assert [(row["name"], row["prompt"], row["text"]) for row in rows] == [
        ("a.png", "q", parrot.text),
        ("b.jpg", "q", parrot.text),
        ("c.png", "q", None),
    ]
    assert [row["error"] for row in rows[:2]] == [None, None]
    assert "not an image file" in rows[2]["error"]
    assert sorted(p.name for p in out.iterdir()) == ["a.png.png", "answers.jsonl", "b.jpg.png"]
    boxes = parse_boxes(parrot.text)
    assert [box["phrase"] for box in rows[0]["boxes"]] == ["two ships"] * 2
    assert rows[0]["boxes"][1]["polygon"] == boxes[1].polygon(120, 80).round(2).tolist()
    assert "2 of 3 pictures answered" in capsys.readouterr().err


def test_a_stopped_run_goes_on(parrot, ask, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(batch, "_AT_ONCE", 1)
    answer_each = parrot.answer_each

    def stopped(requests, **options):
        if len(parrot.requests) == 1:
            raise KeyboardInterrupt
        return answer_each(requests, **options)

    monkeypatch.setattr(parrot, "answer_each", stopped)
    assert ask() == 130
    unfinished = tmp_path / "out" / "answers.partial.jsonl"
    assert [row["name"] for row in read_rows(unfinished)] == ["a.png"]
    with unfinished.open("a") as file:
        file.write('{"name": "b.jpg", "text": "cut o')
    monkeypatch.setattr(parrot, "answer_each", answer_each)
    assert ask() == 1
    assert [Path(request.images[0]).name for request in parrot.requests] == ["a.png", "b.jpg", "c.png"]
    Image.new("RGB", (9, 9)).save(folder / "c.png")  # what failed is asked again
    assert ask() == 0
    assert [Path(request.images[0]).name for request in parrot.requests[3:]] == ["c.png"]
    rows = read_rows(tmp_path / "out" / "answers.jsonl")
    assert [row["name"] for row in rows] == ["a.png", "b.jpg", "c.png"]
    assert all(row["text"] == parrot.text for row in rows)
    assert not unfinished.exists()


def test_answers_of_another_run_are_not_mixed_in(parrot, ask, refused, tmp_path: Path) -> None:
    ask()
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    again = ["--model-path", "m", "--images", str(tmp_path / "pictures"), "--output", str(tmp_path / "out")]
    assert "(prompt was 'q', now 'other')" in refused(cli.main, [*again, "--prompt", "other"])
    assert "(decoding was" in refused(cli.main, [*again, "--prompt", "q", "--temperature", "0.5"])
    assert "(model was" in refused(cli.main, [*again, "--prompt", "q", "--model-path", "n"])
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_any_words_of_a_model_stay_one_row(parrot, ask, tmp_path: Path) -> None:
    parrot.text = "a\nb\u2028c\ud800 é <p>x</p> {<1><2><3><4>|<500>}"
    assert ask() == 1
    lines = (tmp_path / "out" / "answers.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 4
    assert json.loads(lines[0])["text"].startswith("a\nb\u2028c")


def test_answers_equal_those_of_the_model(tiny_model: Path, ask, folder: Path, tmp_path: Path) -> None:
    options = ["--model-path", str(tiny_model), "--device", "cpu", "--max-new-tokens", "4"]
    assert ask(*options, prompt="What is this?") == 1
    chat = Chat.load(tiny_model, device="cpu")
    request = Request.ask("What is this?", folder / "a.png")
    rows = read_rows(tmp_path / "out" / "answers.jsonl")
    assert rows[0]["text"] == chat.answer([request], max_new_tokens=4)[0].text
