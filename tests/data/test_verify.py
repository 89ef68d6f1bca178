"""The linter: every kind of problem is found at its row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geochat.data.verify import KINDS, main, verify


def record(question: str, answer: str, image: object = None) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "good.jpg")
    whole = (images / "good.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    return images


@pytest.fixture
def bad(tmp_path: Path, folder: Path) -> Path:
    rows = [
        record("<image>\nq", "a", "good.jpg"),
        record("<image>\nq", "a", "cut.jpg"),
        record("<image>\nq", "a", "empty.png"),
        record("<image>\nq", "a", "gone.png"),
        record("q", "a", "good.jpg"),
        record("<image>\nq", " ", "good.jpg"),
        record("<image>\n[identify] {<1><2><3><4>|<5>}", "{<1><2><3><4>}", "good.jpg"),
        {"id": "x"},
        record("<image><image>\nq", "a", ["good.jpg", "cut.jpg"]),
        record("q", "a"),
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    return path


EXPECTED = [
    (1, "image"),
    (2, "image"),
    (3, "missing"),
    (4, "count"),
    (5, "supervision"),
    (6, "box"),
    (7, "record"),
    (8, "image"),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_problem_is_found_at_its_row(bad: Path, folder: Path, workers: int, monkeypatch):
    monkeypatch.setattr("geochat.data.verify._CHUNK", 1)
    rows, problems = verify(bad, folder, workers=workers)
    assert rows == 10
    assert [(problem.row, problem.kind) for problem in problems] == EXPECTED


def test_without_decoding_truncated_images_pass(bad: Path, folder: Path):
    _, problems = verify(bad, folder, decode=False)
    assert {problem.kind for problem in problems} == set(KINDS) - {"image"}


def test_without_a_folder_only_records_are_checked(bad: Path):
    _, problems = verify(bad)
    assert [(p.row, p.kind) for p in problems] == [
        pair for pair in EXPECTED if pair[1] not in ("image", "missing")
    ]


def test_broken_lines_are_rows_too(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record("q", "a")) + '\n{"id": \n')
    _, problems = verify(path)
    assert [(problem.row, problem.kind) for problem in problems] == [(1, "record")]
    assert problems[0].reason.startswith("not valid JSON")


def test_the_report_and_the_exit_codes(bad: Path, folder: Path, tmp_path: Path, capsys):
    report = tmp_path / "out" / "report.json"
    assert main([str(bad), "--image-folder", str(folder), "--json", str(report), "--show", "1"]) == 1
    printed = capsys.readouterr().out
    assert "10 rows, 8 with problems" in printed
    assert "row 3: " in printed
    assert "… and 2 more" in printed
    content = json.loads(report.read_text())
    assert content["counts"] == {
        "record": 1,
        "count": 1,
        "supervision": 1,
        "box": 1,
        "missing": 1,
        "image": 3,
    }
    assert [(problem["row"], problem["kind"]) for problem in content["problems"]] == EXPECTED


def test_a_clean_file(tmp_path: Path, folder: Path, capsys):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([record("<image>\nq", "a", "good.jpg")]))
    assert main([str(path), "--image-folder", str(folder), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "1 rows, 0 with problems" in out
    assert err == ""


def test_what_cannot_be_checked_is_one_line(tmp_path: Path, bad: Path, refused):
    assert "no such file" in refused(main, [str(tmp_path / "none.json")])
    assert "no such folder" in refused(main, [str(bad), "--image-folder", str(tmp_path / "nowhere")])


def test_it_runs_as_a_module(bad: Path):
    command = [sys.executable, "-m", "geochat.data.verify", str(bad), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "malformed records: 1" in done.stdout


def test_the_tiny_records_are_clean(tiny_records):
    assert verify(tiny_records.file, tiny_records.image_folder)[1] == []


def test_a_strange_name_does_not_end_the_check(tmp_path: Path, folder: Path):
    record = {
        "id": "1",
        "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
    }
    (tmp_path / "rows.json").write_text(
        json.dumps([{**record, "image": "x" * 300 + ".png"}, {**record, "image": "no.png"}])
    )
    rows, problems = verify(tmp_path / "rows.json", folder)
    assert rows == 2
    assert [(problem.row, problem.kind) for problem in problems] == [(0, "missing"), (1, "missing")]
