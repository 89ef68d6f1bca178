"""The command end to end on a tiny model: complete, resumed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from PIL import Image

from geochat.chat.engine import Chat
from geochat.eval import run as module
from geochat.eval.answers import ANSWERS, PARTIAL
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import read_json, read_rows, write_rows
from geochat.model.adapter import AdapterSpec, attach, save_adapter
from geochat.model.base import BaseRecord
from geochat.model.checkpoint import load

BOX = [[10, 10], [20, 10], [20, 20], [10, 20]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(3):
        Image.new("RGB", (60 + i, 40), (40 * i, 90, 60)).save(tmp_path / "images" / f"{i}.png")
        common = {"image": f"{i}.png", "scene": "harbour", "answer": "harbour"}
        rows += [
            {"question_id": f"{i}_s", "text": "Scene?", "task": "scene", "ground_truth": "harbour", **common},
            {
                "question_id": f"{i}_r",
                "text": "[refer] Where?",
                "task": "refer",
                "ground_truth": [BOX],
                **common,
            },
        ]
    write_rows(tmp_path / "questions.jsonl", rows)
    return tmp_path


def command(data: Path, model: Path, *more: str) -> list[str]:
    return [
        "--model-path", str(model), "--benchmark", "nano", "--questions", str(data / "questions.jsonl"),
        "--output", str(data / "out"), "--device", "cpu", "--max-new-tokens", "5", "--batch-size", "2", *more,
    ]  # fmt: skip


def test_answers_and_scores(data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.main(command(data, tiny_model))
    rows = read_rows(data / "out" / ANSWERS)
    assert [row["question_id"] for row in rows] == [
        r["question_id"] for r in read_rows(data / "questions.jsonl")
    ]
    first = rows[0]
    assert (first["prompt"], first["expected"], first["width"], first["height"]) == (
        "Scene?",
        "harbour",
        60,
        40,
    )
    assert first["decoding"] == {
        "max_new_tokens": 5, "temperature": 0.0, "template": "vicuna_v1", "image_size": 84, "image_mode": "pad",
        "dtype": "float32", "quantization": None,
    }  # fmt: skip
    assert len(first["model"]) >= 16
    assert "answer" not in first
    scores = read_json(data / "out" / "scores.json")
    assert (scores["n"], scores["not_asked"], scores["model"]) == (6, 0, first["model"])
    assert not (data / "out" / PARTIAL).exists()
    assert "| scene, micro | 3 |" in capsys.readouterr().out


def test_a_stopped_run_goes_on(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.main(command(data, tiny_model))
    complete = (data / "out" / ANSWERS).read_text()
    lines = complete.splitlines(keepends=True)
    (data / "out" / ANSWERS).unlink()
    (data / "out" / PARTIAL).write_text("".join(lines[:3]) + lines[3][:40])  # killed in the middle of a row
    asked: list[int] = []
    original = module.ask

    def counted(chat, benchmark, items, **options):
        asked.append(len(items))
        return original(chat, benchmark, items, **options)

    monkeypatch.setattr(module, "ask", counted)
    module.main(command(data, tiny_model))
    assert asked == [3]
    assert (data / "out" / ANSWERS).read_text() == complete
    module.main(command(data, tiny_model))  # complete: only scored again
    assert asked == [3, 0]
    assert (data / "out" / ANSWERS).read_text() == complete


def test_a_corrected_truth_is_scored_without_asking_again(data: Path, tiny_model: Path) -> None:
    module.main(command(data, tiny_model))
    rows = read_rows(data / "questions.jsonl")
    said = read_rows(data / "out" / ANSWERS)[0]["text"]
    write_rows(data / "questions.jsonl", [{**rows[0], "ground_truth": said or "x"}, *rows[1:]])
    module.main(command(data, tiny_model))
    assert read_rows(data / "out" / ANSWERS)[0]["ground_truth"] == (said or "x")
    assert read_json(data / "out" / "scores.json")["tasks"]["scene"]["overall"]["accuracy"] == (
        1 / 3 if said else 0
    )


def test_another_picture_is_another_question(data: Path, tiny_model: Path, refused) -> None:
    module.main(command(data, tiny_model))
    Image.new("RGB", (60, 40), "white").save(data / "images" / "0.png")
    assert "picture was" in refused(module.main, command(data, tiny_model))


def test_a_limit_loses_no_answers(data: Path, tiny_model: Path) -> None:
    module.main(command(data, tiny_model))
    module.main(command(data, tiny_model, "--limit", "2"))
    assert len(read_rows(data / "out" / ANSWERS)) == 6
    assert read_json(data / "out" / "scores.json")["n"] == 2


def test_an_adapter_is_scored(data: Path, tiny_model: Path) -> None:
    model, processor = load(tiny_model)
    adapted = attach(model, AdapterSpec(r=4))
    save_adapter(adapted, processor, data / "adapter", base=BaseRecord.of(tiny_model))
    module.main(command(data, data / "adapter"))
    assert read_json(data / "out" / "scores.json")["n"] == 6


def test_answers_of_another_run_are_not_mixed_in(data: Path, tiny_model: Path, refused) -> None:
    module.main(command(data, tiny_model))
    before = (data / "out" / ANSWERS).read_text()
    line = refused(module.main, command(data, tiny_model, "--image-mode", "crop"))
    assert re.search(r"holds answers of another run \(decoding was .*choose another --output", line)
    assert (data / "out" / ANSWERS).read_text() == before
    module.main(command(data, tiny_model, "--image-mode", "crop", "--overwrite"))
    assert read_rows(data / "out" / ANSWERS)[0]["decoding"]["image_mode"] == "crop"


def test_a_damaged_image_is_a_failure_not_an_answer(
    data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "images" / "1.png").write_bytes((data / "images" / "1.png").read_bytes()[:50])
    module.main(command(data, tiny_model))
    rows = read_rows(data / "out" / ANSWERS)
    bad = [row for row in rows if row["text"] is None]
    assert [row["question_id"] for row in bad] == ["1_s", "1_r"]
    assert all("1.png" in row["error"] for row in bad)
    scores = read_json(data / "out" / "scores.json")
    assert scores["not_asked"] == 2
    assert scores["tasks"]["refer"]["overall"]["true_boxes"] == 3
    assert "2 questions could not be asked" in capsys.readouterr().out


def test_refusals(data: Path, tiny_model: Path, tmp_path: Path, refused) -> None:
    arguments = ["--model-path", "m", "--benchmark", "referring", "--output", str(tmp_path / "o")]
    assert "no question file there; give --questions" in refused(module.main, arguments)
    (data / "images" / "2.png").unlink()
    line = refused(module.main, command(data, tiny_model))
    assert re.search(r"error: 2 of 6 images are not there .*2\.png .*--image-folder", line)
    module.main(command(data, tiny_model, "--limit", "4"))
    assert len(read_rows(data / "out" / ANSWERS)) == 4
    assert "no checkpoint" in refused(module.main, command(data, tmp_path / "nothing", "--limit", "4"))
    rows = read_rows(data / "questions.jsonl")
    write_rows(data / "questions.jsonl", [{**rows[0], "ground_truth": None}])
    assert "no truth in column" in refused(module.main, command(data, tiny_model))


def test_scores_without_files(data: Path, tiny_model: Path) -> None:
    chat, benchmark = Chat.load(tiny_model, device="cpu"), Benchmark.load("nano")
    scores = module.evaluate(chat, benchmark, read_rows(data / "questions.jsonl"), data / "images")
    assert scores["tasks"]["scene"]["overall"]["n"] == 3
    json.dumps(scores)
