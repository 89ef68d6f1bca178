"""Files for servers, byte for byte what they take."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from geochat.eval.answer_files import read_answers, read_sheet
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import write_rows
from geochat.eval.score import judge, summarise
from geochat.eval.submit import main


def answers(file: Path, texts: dict) -> Path:
    write_rows(file, [{"question_id": key, "prompt": "Q", "text": text} for key, text in texts.items()])
    return file


def submit(name: str, answers_file: Path, questions: Path, output: Path, *more: str) -> None:
    main(
        [
            str(answers_file),
            "--benchmark",
            name,
            "--questions",
            str(questions),
            "--output",
            str(output),
            *more,
        ]
    )


def test_vqav2_holds_every_question_of_the_test_set(tmp_path: Path) -> None:
    dev, every = tmp_path / "dev.jsonl", tmp_path / "llava_vqav2_mscoco_test2015.jsonl"
    write_rows(dev, [{"question_id": 2, "image": "2.jpg", "text": "Q"}])
    write_rows(every, [{"question_id": i, "image": f"{i}.jpg", "text": "Q"} for i in (1, 2)])
    submit("vqav2", answers(tmp_path / "a.jsonl", {2: "The two Dogs."}), dev, tmp_path / "out.json")
    expected = [{"question_id": 1, "answer": ""}, {"question_id": 2, "answer": "2 dogs"}]
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_gqa_and_vizwiz(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    write_rows(questions, [{"question_id": 7, "image": "v.jpg", "text": "Q"}])
    given = answers(tmp_path / "a.jsonl", {7: "The Dog."})
    submit("vizwiz", given, questions, tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text()) == [{"image": "v.jpg", "answer": "dog"}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/testdev_balanced_questions.json").write_text('{"7": {"answer": "dog"}}')
    submit("gqa", given, questions, tmp_path / "g.json")
    assert json.loads((tmp_path / "g.json").read_text()) == [{"questionId": "7", "prediction": "the dog"}]


def mmbench(folder: Path, *, more: tuple[str, ...]) -> Path:
    picture = base64.b64encode(bytes(80)).decode()
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", *more]
    first = ["5", "Which?", "", "x", "y", "z", "", "B", "logic", picture, *("-" for _ in more)]
    turns = [["1000005", "Which?", "", "z", "x", "y", "", "C", "logic", "5", *("-" for _ in more)], first]
    file = folder / "m.tsv"
    file.write_text("".join("\t".join(line) + "\n" for line in (names, *turns)))
    return file


@pytest.mark.parametrize(
    "more", [(), ("source", "comment", "l2-category")]
)  # newer tables have fewer columns
def test_mmbenchs_table(tmp_path: Path, more: tuple[str, ...]) -> None:
    given = answers(tmp_path / "a.jsonl", {5: "B", 1000005: "=C"})
    submit("mmbench/dev", given, mmbench(tmp_path, more=more), tmp_path / "out.xlsx")
    first, second = read_sheet(tmp_path / "out.xlsx")
    assert list(first) == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert (first["index"], first["prediction"], second["prediction"]) == (1000005, "=C", "B")
    assert first["D"] is None


def test_xtuners_table_is_in_order_and_scores(tmp_path: Path) -> None:
    given = answers(tmp_path / "a.jsonl", {1000005: "C", 5: "B"})
    output = tmp_path / "mmbench_result.xlsx"
    submit("mmbench/dev", given, mmbench(tmp_path, more=("l2-category",)), output, "--layout", "xtuner")
    rows = read_sheet(output)
    assert list(rows[0]) == [
        "question",
        "A",
        "B",
        "C",
        "prediction",
        "category",
        "l2-category",
        "index",
        "split",
        "answer",
    ]
    assert [row["index"] for row in rows] == [5, 1000005]
    assert rows[0]["split"] == "dev"
    benchmark = Benchmark.load("mmbench/dev")
    judged = judge(read_answers(output, benchmark), benchmark)
    overall = summarise(judged, benchmark, total=2)["tasks"]["mmbench/dev"]["overall"]
    assert (overall["questions"], overall["circular_accuracy"]) == (1, 1.0)


def test_what_cannot_be_handed_in(tmp_path: Path, refused) -> None:
    given, table = answers(tmp_path / "a.jsonl", {5: "B"}), mmbench(tmp_path, more=())
    start = [str(given), "--output", str(tmp_path / "o"), "--questions", str(table), "--benchmark"]
    assert "1 of 2 questions have no answer, the first is 1000005" in refused(main, [*start, "mmbench/dev"])
    assert "aid has no file to hand in; --layout names one" in refused(main, [*start, "aid"])
    control = answers(tmp_path / "c.jsonl", {5: "\x01", 1000005: "B"})
    assert "control characters" in refused(main, [str(control), *start[1:], "mmbench/dev"])
    assert not (tmp_path / "o").exists()
