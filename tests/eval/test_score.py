"""Scores of published answer files, and of hand-made ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from geochat.eval import captions
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import read_rows, write_rows
from geochat.eval.score import join, judge, main, summarise, table


def scores_of(file: Path, name: str) -> dict:
    benchmark, rows = Benchmark.load(name), read_rows(file)
    return summarise(judge(rows, benchmark), benchmark, total=len(rows))


def test_ucmerced_of_the_released_model(published: Path) -> None:
    task = scores_of(published / "UCmerced_geochat_7b.jsonl", "ucmerced")["tasks"]["ucmerced"]
    assert (task["overall"]["correct"], task["overall"]["n"]) == (1774, 2100)
    assert task["macro"]["groups"] == 21


def test_aid_of_the_released_model(published: Path) -> None:
    task = scores_of(published / "AID_geochat_7b.jsonl", "aid")["tasks"]["aid"]
    assert (task["overall"]["correct"], task["overall"]["n"]) == (2157, 3000)
    assert task["overall"]["failed"] > 0  # "Harbor" and the like are no class of AID
    assert task["macro"]["groups"] == 30


def test_lrben_of_the_released_model(published: Path) -> None:
    scores = scores_of(published / "lrben_geochat_7b.jsonl", "lrben")
    assert (scores["n"], scores["excluded"]) == (7057, 2947)
    task = scores["tasks"]["lrben"]
    accuracy = {name: round(s["accuracy"], 4) for name, s in task["strata"]["category"].items()}
    assert accuracy == {"presence": 0.9096, "comp": 0.9025, "rural_urban": 0.95}
    assert round(task["overall"]["accuracy"], 4) == 0.9062
    assert round(task["macro"]["accuracy"], 4) == round(sum(accuracy.values()) / 3, 4)


def test_region_captions_of_the_released_model(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "wordnet", lambda: None)  # the figures are those without it
    captions.caption_scores.cache_clear()
    scores = scores_of(published / "region_caption_geochat_7b.jsonl", "region_captioning")
    overall = scores["tasks"]["region_captioning"]["overall"]
    assert (overall["n"], overall["failed"]) == (2797, 0)
    assert [round(100 * overall[key], 1) for key in ("rouge1", "rougeL", "meteor")] == [74.0, 74.0, 63.3]
    assert "METEOR: exact and stem matches" in table(scores)


def test_counting_of_the_released_model(published: Path) -> None:
    rows = read_rows(published / "lrben_geochat_7b.jsonl")
    benchmark = replace(Benchmark.load("rsvqa/lr_count"), only={"category": ["count"]})
    overall = summarise(judge(rows, benchmark), benchmark, total=len(rows))["tasks"]["rsvqa/lr_count"][
        "overall"
    ]
    assert (overall["n"], round(overall["accuracy"], 4)) == (2947, 0.2518)


BOX = [[10, 10], [20, 10], [20, 20], [10, 20]]
NANO = [
    {"question_id": 1, "task": "scene", "ground_truth": "harbour", "text": "harbour", "prompt": "?"},
    {"question_id": 2, "task": "scene", "ground_truth": "desert", "text": "harbour", "prompt": "?"},
    {"question_id": 3, "task": "count", "ground_truth": "2", "text": None, "prompt": "?"},
    {"question_id": 4, "task": "identify", "ground_truth": "red ship", "class": "ship", "text": "a ship", "prompt": "?"},
    {"question_id": 5, "task": "refer", "ground_truth": [BOX], "text": "{<10><10><20><20>|<90>}", "prompt": "?",
     "width": 100, "height": 100, "objects": "single"},
    {"question_id": 6, "task": "refer", "ground_truth": [BOX, BOX], "text": "{<10><10><20><20>|<90>}", "prompt": "?",
     "width": 100, "height": 100, "objects": "multi"},
]  # fmt: skip


def test_nano_by_task() -> None:
    benchmark = Benchmark.load("nano")
    judged = judge(NANO, benchmark)
    scores = summarise(judged, benchmark, total=len(NANO))
    tasks = scores["tasks"]
    assert list(tasks) == ["scene", "count", "identify", "refer"]
    assert tasks["scene"]["overall"]["accuracy"] == 0.5
    assert tasks["count"]["overall"] | {"interval95": 0} == {
        "n": 1, "parsed": 0, "failed": 1, "correct": 0, "accuracy": 0.0, "interval95": 0, "accuracy_lenient": 0.0,
    }  # fmt: skip
    assert tasks["identify"]["overall"]["accuracy"] == 1.0
    assert tasks["refer"]["overall"]["recall@0.5"] == pytest.approx(2 / 3)
    assert tasks["refer"]["strata"]["objects"]["single"]["single@0.5"] == 1.0
    assert tasks["refer"]["strata"]["objects"]["multi"]["recall@0.5"] == 0.5
    assert tasks["refer"]["macro"]["recall@0.5"] == 0.75
    assert scores["iou"] == "rotated"
    json.dumps(scores)
    text = table(scores)
    assert "| scene, micro | 2 | 0 | 50.00 |" in text
    assert "refer, macro over 2 × objects" in text
    assert text.count("\n| boxes (shares in %)") == 1


def test_questions_without_answer_count_and_strangers_do_not(tmp_path: Path) -> None:
    questions = [{"question_id": i, "text": "Q", "category": "comp", "ground_truth": "yes"} for i in (1, 2)]
    benchmark = Benchmark.load("lrben")
    rows = join([{"question_id": "1", "answer": "Yes"}], questions, "a.jsonl")
    overall = summarise(judge(rows, benchmark), benchmark, total=2)["tasks"]["lrben"]["overall"]
    assert (overall["n"], overall["correct"], overall["failed"]) == (2, 1, 1)
    with pytest.raises(ValueError, match="1 answers belong to no question, the first is '9'"):
        join([{"question_id": 9, "answer": "Yes"}], questions, "a.jsonl")


def test_refusals_name_file_and_question() -> None:
    lrben, referring = Benchmark.load("lrben"), Benchmark.load("referring")
    with pytest.raises(ValueError, match=r"f: question 1: no truth in column 'ground_truth'; .*--questions"):
        judge([{"question_id": 1, "category": "comp", "answer": "yes"}], lrben, source="f")
    row = {
        "question_id": "a",
        "ground_truth": [BOX],
        "answer": "{<1><2><3><4>}",
        "type": "ref",
        "dataset": "NEW",
    }
    with pytest.raises(ValueError, match="question a: dataset is 'NEW'; known: FAST"):
        judge([row], referring)
    with pytest.raises(ValueError, match=r"question a: boxes must be lists of four"):
        judge([row | {"dataset": "FAST", "ground_truth": [[1, 2, 3, 4]]}], referring)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused) -> None:
    answers = tmp_path / "answers.jsonl"
    write_rows(answers, NANO)
    main([str(answers), "--benchmark", "nano", "--iou", "hbb", "--output", str(tmp_path / "out")])
    assert "# nano: 6 questions (hbb IoU)" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scores.json", "scores.md", "samples.jsonl"}
    assert len(read_rows(tmp_path / "out" / "samples.jsonl")) == 6
    for arguments in (
        [str(tmp_path / "no.jsonl"), "--benchmark", "nano"],
        [str(answers), "--benchmark", "none"],
    ):
        assert re.search("(cannot be read|no benchmark)", refused(main, arguments))


REFERRING = {
    "question_id": "a", "image_id": "1", "question": "ships", "type": "ref", "dataset": "SIOR", "size_group": "small",
    "ground_truth": [[[80, 80], [160, 80], [160, 160], [80, 160]]], "answer": "{<10><10><20><20>|<90>}" * 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "figure"),
    [
        ((), "| 50.00 |"),
        (("--match", "earthdial"), "| 2 | 2 | 100.00 |"),
        (("--match", "vrsbench"), "100.00 | 100.00 |"),
    ],
)
def test_boxes_as_others_match_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options, figure: str
) -> None:
    write_rows(tmp_path / "a.jsonl", [REFERRING])
    main([str(tmp_path / "a.jsonl"), "--benchmark", "referring", *options])
    printed = capsys.readouterr().out
    assert figure in printed
    assert "- not the published subset: 1 questions, not 7593" in printed


def test_a_scorer_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused) -> None:
    file = tmp_path / "r.jsonl"
    write_rows(
        file, [{"filename": "a.png", "size": [8, 8], "query": "{IDK} Ship?", "answer": "no", "pred": "No"}]
    )
    start = [str(file), "--benchmark", "vhm/presence"]
    main([*start, "--scorer", "rsevalkit"])
    assert "| vhm/presence, micro | 1 | 1 | 0.00 |" in capsys.readouterr().out
    main(start)
    assert "| vhm/presence, micro | 1 | 0 | 100.00 |" in capsys.readouterr().out
    assert "no scorer 'x'; known: rsevalkit" in refused(main, [*start, "--scorer", "x"])
    assert "--match is for boxes" in refused(main, [*start, "--match", "earthdial"])


def test_an_unscored_benchmark_counts_its_answers() -> None:
    benchmark = Benchmark.load("vizwiz")
    rows = [{"question_id": i, "prompt": "Q", "text": text} for i, text in enumerate(("a", ""))]
    overall = summarise(judge(rows, benchmark), benchmark, total=2)["tasks"]["vizwiz"]["overall"]
    assert overall == {"n": 2, "parsed": 1, "failed": 1, "answered": 0.5}


def test_no_question_is_left_out_for_its_number() -> None:
    # RSVQA-HR's ids pass a million, from where MMBench counts its turns.
    rows = [
        {"question_id": i, "category": "comp", "ground_truth": "yes", "answer": "Yes"}
        for i in (7, 1_021_598, 1_000_007)
    ]
    benchmark = Benchmark.load("hrben")
    assert summarise(judge(rows, benchmark), benchmark, total=3)["tasks"]["hrben"]["overall"]["correct"] == 3
