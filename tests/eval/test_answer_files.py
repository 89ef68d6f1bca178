"""Answer files of the original programs are known by their content."""

from __future__ import annotations

from pathlib import Path

import pytest
from openpyxl import Workbook

from geochat.eval.answer_files import answer_text, read_answers
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import write_rows
from geochat.eval.score import join, judge


def test_words_of_an_answer() -> None:
    assert answer_text({"prompt": "q", "text": "ours", "answer": "truth"}, "w") == "ours"
    assert answer_text({"text": "the question", "answer": "theirs"}, "w") == "theirs"
    assert answer_text({"text": "words"}, "w") == "words"
    assert answer_text({"prompt": "q", "text": None}, "w") == ""
    with pytest.raises(ValueError, match="neither"):
        answer_text({}, "w")
    with pytest.raises(ValueError, match="must be a string, not int"):
        answer_text({"answer": 3}, "w")


def result(picture: str, query: str, answer: str, pred: str | None) -> dict:
    return {
        "filename": f"/data/x/{picture}",
        "size": [40, 60],
        "query": f"{{IDK}} {query}",
        "answer": answer,
        "pred": pred,
    }


def test_rsevalkits_results_bring_their_truth(tmp_path: Path) -> None:
    file = tmp_path / "presence_mo_dota_vhm-7b_sft_eval.jsonl"
    write_rows(file, [result("a.png", "Ship?", "yes", "Yes."), result("b.png", "Ship?", "no", None)])
    benchmark = Benchmark.load("vhm/presence")
    rows = read_answers(file, benchmark)
    assert [row["question_id"] for row in rows] == ["a.png: Ship?", "b.png: Ship?"]
    assert (rows[0]["width"], rows[0]["height"]) == (60, 40)
    assert [v["correct"] for v in judge(rows, benchmark)] == [True, False]
    file.write_text('{"pred": "x"}\n')
    with pytest.raises(ValueError, match="row 1 has no 'filename'"):
        read_answers(file, benchmark)


def test_results_lost_between_processes_count_as_failed(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    write_rows(file, [result("b.png", "Ship?", "no", "no")])
    questions = [
        {
            "question_id": f"{name}.png: Ship?",
            "image": f"x/{name}.png",
            "text": "Ship?",
            "ground_truth": truth,
        }
        for name, truth in (("a", "yes"), ("b", "no"))
    ]
    benchmark = Benchmark.load("vhm/presence")
    judged = judge(join(read_answers(file, benchmark), questions, "r"), benchmark)
    assert [(v["parsed"], v["correct"]) for v in judged] == [(False, False), (True, True)]


def sheet(file: Path, rows: list[list]) -> Path:
    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(file)
    return file


def test_xtuners_table(tmp_path: Path) -> None:
    head = ["question", "A", "B", "C", "prediction", "category", "index", "split", "answer"]
    rows = [
        head,
        ["Q", "x", "y", None, "B", "c", 1_000_004, None, "B"],
        ["Q", "y", "x", None, None, "c", 4, None, "A"],
    ]
    benchmark = Benchmark.load("mmbench/dev")
    read = read_answers(sheet(tmp_path / "mmbench_result.xlsx", rows), benchmark)
    judged = judge(read, benchmark)
    assert [(v["circle"], v["turns"], v["correct"]) for v in judged] == [(4, 2, True), (4, 2, False)]
    (tmp_path / "no.xlsx").write_text("no table")
    with pytest.raises(ValueError, match=r"not an \.xlsx file"):
        read_answers(tmp_path / "no.xlsx", benchmark)
    with pytest.raises(ValueError, match="cannot be read"):
        read_answers(tmp_path / "nowhere.xlsx", benchmark)


def test_llavas_textvqa_answers_share_their_id(tmp_path: Path) -> None:
    file = tmp_path / "merge.jsonl"
    write_rows(
        file,
        [{"question_id": "ab", "prompt": f"What {i}?\nReference OCR token: x", "text": "2"} for i in (2, 1)],
    )
    benchmark = Benchmark.load("textvqa")
    questions = [{"question_id": f"ab: what {i}?", "text": "", "ground_truth": [str(i)] * 10} for i in (1, 2)]
    judged = judge(join(read_answers(file, benchmark), questions, "m"), benchmark)
    assert [v["vqa_accuracy"] for v in judged] == [0, 1]
    write_rows(file, [{"question_id": "ab: what 1?", "prompt": "What 1?", "text": "1"}])  # ours
    assert read_answers(file, benchmark)[0]["question_id"] == "ab: what 1?"
