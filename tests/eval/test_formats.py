"""Question files of the originals: rows, truths joined by id, and what is said of broken files."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from geochat.eval.benchmark import Benchmark
from geochat.eval.files import write_json, write_rows
from geochat.eval.tsv import main, read_options, write_pictures


def benchmark(name: str, **changes) -> Benchmark:
    from geochat.eval.catalogue import find

    table, root, where = find(name)
    return Benchmark.parse(table | changes, root, where)


def rsvqa(folder: Path, count: int = 6) -> Path:
    """RSVQA's three files with the answers in another order, and inactive entries."""
    questions = [
        {"id": 10 + i, "img_id": i % 2, "type": "presence", "question": f"Is there a {i}?", "active": i != 5}
        for i in range(count)
    ]
    answers = [
        {"id": i, "question_id": 10 + i, "answer": "yes" if i % 3 else "no", "active": True}
        for i in range(count)
    ]
    answers.append({"id": 99, "question_id": 10, "answer": "maybe", "active": False})
    random.Random(1).shuffle(answers)
    write_json(folder / "X_questions.json", {"questions": questions})
    write_json(folder / "X_answers.json", {"answers": answers})
    return folder / "X_questions.json"


def test_rsvqa_is_joined_by_id(tmp_path: Path) -> None:
    file = rsvqa(tmp_path)
    rows = benchmark("rsvqa/lr").read_questions(file)
    assert [row["question_id"] for row in rows] == [10, 11, 12, 13, 14]
    assert [row["ground_truth"] for row in rows] == ["no", "yes", "yes", "no", "yes"]
    assert rows[1]["image"] == "1.tif"
    prompt = benchmark("rsvqa/lr").prompt_of(rows[0], "q")
    assert prompt == "Is there a 0?\nAnswer the question using a single word or phrase."
    write_json(tmp_path / "X_answers.json", {"answers": []})
    with pytest.raises(ValueError, match="question 10 has no answer"):
        benchmark("rsvqa/lr").read_questions(file)
    write_json(tmp_path / "X_answers.json", [])
    with pytest.raises(ValueError, match='expected an object with a list "answers"'):
        benchmark("rsvqa/lr").read_questions(file)


def test_rsvqa_as_published(rsvqa_samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOCHAT_BENCHMARKS", str(rsvqa_samples))
    for name, count in (("rsvqa/lr", 400), ("rsvqa/hr", 300), ("rsvqa/hr_phili", 201)):
        chosen = Benchmark.load(name)
        rows = chosen.read_questions()
        assert len(rows) == count
        assert {row["ground_truth"] for row in rows if row["category"] == "presence"} == {"yes", "no"}
        pictures = {chosen.image_of(row, "q") for row in rows}
        assert all((chosen.root / chosen.image_folder / picture).is_file() for picture in pictures)


def test_geochats_rsvqa_questions_get_their_truth(tmp_path: Path) -> None:
    rsvqa(tmp_path)
    (tmp_path / "rsvqa_lr").mkdir()
    (tmp_path / "X_answers.json").rename(tmp_path / "rsvqa_lr" / "LR_split_test_answers.json")
    file = tmp_path / "lrben.jsonl"
    row = {
        "question_id": 13,
        "image": "1.tif",
        "text": "Is it?\nAnswer the question using a single word or phrase.",
    }
    write_rows(file, [row | {"category": "presence"}])
    (read,) = benchmark("lrben").read_questions(file)
    assert read["ground_truth"] == "no"
    assert benchmark("lrben").prompt_of(read, "q") == row["text"]  # the suffix is there already, once
    write_rows(file, [row | {"question_id": 77}])
    with pytest.raises(ValueError, match="question 77 has no answer"):
        benchmark("lrben").read_questions(file)
    with pytest.raises(ValueError, match=r"another file; name it in the benchmark, files\.answers"):
        benchmark("lrben", files={}).read_questions(file)


def talk(question: str, answer: str, **columns) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **columns,
    }


def test_rsevalkit_rows(tmp_path: Path) -> None:
    file = tmp_path / "presence_mo_dota.json"
    items = [
        talk("<image>\nIs there a ship?", "yes", image="a.png", image_path="images", size=[40, 60]),
        talk("Is there a ship?", "no", image="a.png", image_path="images"),
    ]
    write_json(file, items)
    chosen = benchmark("vhm/presence")
    first, second = chosen.read_questions(file)
    assert first["question_id"] == "a.png: Is there a ship?"
    assert second["question_id"] == "a.png: Is there a ship? (2)"
    assert (first["image"], first["ground_truth"]) == ("images/a.png", "yes")
    assert (first["height"], first["width"]) == (40, 60)
    assert chosen.prompt_of(first, "q") == "{IDK} Is there a ship?"
    write_json(file, [talk("Q", "A")])
    with pytest.raises(ValueError, match="row 1: expected an image"):
        chosen.read_questions(file)
    write_json(file, [talk("Q", "A", image="a", size="8x8")])
    with pytest.raises(ValueError, match=r"size must be \[height, width\]"):
        chosen.read_questions(file)


def test_scienceqa_rows(tmp_path: Path) -> None:
    file = tmp_path / "llava_test_CQM-A.json"
    asked = "Which?\nA. x\nB. y"
    write_json(
        file,
        [
            talk(f"<image>\n{asked}", "The answer is B.", id="7", image="7/image.png"),
            talk(asked, "-", id="8"),
        ],
    )
    write_json(tmp_path / "problems.json", {i: {"choices": ["x", "y"], "answer": 1} for i in ("7", "8")})
    chosen = benchmark("scienceqa")
    with_picture, without = chosen.read_questions(file)
    assert with_picture["ground_truth"] == without["ground_truth"] == "B"
    assert (chosen.image_of(with_picture, "q"), chosen.image_of(without, "q")) == ("7/image.png", "")
    assert [row["picture_given"] for row in (with_picture, without)] == ["picture", "no picture"]
    assert (
        chosen.prompt_of(without, "q")
        == f"{asked}\nAnswer with the option's letter from the given choices directly."
    )
    write_json(tmp_path / "problems.json", {})
    with pytest.raises(ValueError, match="question 7: not in"):
        chosen.read_questions(file)


def test_pope_labels_are_not_joined_by_order(tmp_path: Path) -> None:
    tail = "\nAnswer the question using a single word or phrase."
    questions = [
        {"question_id": i, "image": f"{i % 2}.jpg", "text": f"Is there a {i}?{tail}", "category": "random"}
        for i in range(4)
    ]
    write_rows(tmp_path / "llava_pope_test.jsonl", questions)
    labels = [{"question_id": 1, "image": f"{i % 2}.jpg", "text": f"Is there a {i}?", "label": "yes" if i < 2 else "no"}
              for i in (3, 1, 0, 2)]  # fmt: skip
    for name in ("random", "popular", "adversarial"):
        write_rows(tmp_path / f"coco/coco_pope_{name}.json", labels)
    rows = benchmark("pope").read_questions(tmp_path / "llava_pope_test.jsonl")
    assert [row["ground_truth"] for row in rows] == ["yes", "yes", "no", "no"]


def test_textvqa_and_gqa(tmp_path: Path) -> None:
    questions = [
        {"question_id": "ab", "image": "ab.jpg", "text": f"What {i}?\nReference OCR token: x\nAnswer"}
        for i in (1, 2)
    ]
    write_rows(tmp_path / "t.jsonl", questions)
    data = [{"image_id": "ab", "question": f"what {i}?", "answers": [str(i)] * 10} for i in (2, 1)]
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    rows = benchmark("textvqa").read_questions(tmp_path / "t.jsonl")
    assert [row["question_id"] for row in rows] == ["ab: what 1?", "ab: what 2?"]
    assert [row["ground_truth"][0] for row in rows] == ["1", "2"]
    write_rows(tmp_path / "g.jsonl", [{"question_id": "05", "image": "n.jpg", "text": "Left?"}])
    write_json(tmp_path / "data/testdev_balanced_questions.json", {"05": {"answer": "yes"}})
    assert benchmark("gqa").read_questions(tmp_path / "g.jsonl")[0]["ground_truth"] == "yes"


PICTURE = b"\xff\xd8" + bytes(range(64))


def table(file: Path, rows: list[dict]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    file.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return file


def mmbench_table(folder: Path) -> Path:
    first = {"index": 3, "question": "Which?", "hint": "Look.", "A": "x", "B": "y", "answer": "A"}
    rows = [
        first | {"image": base64.b64encode(PICTURE).decode(), "l2-category": "logic"},
        first
        | {
            "index": 1_000_003,
            "hint": "nan",
            "A": "y",
            "B": "x",
            "answer": "B",
            "image": 3,
            "l2-category": "logic",
        },
    ]
    return table(folder / "m.tsv", rows)


def test_mmbench_rows(tmp_path: Path) -> None:
    file = mmbench_table(tmp_path)
    first, second = benchmark("mmbench/dev").read_questions(file)
    assert first["text"] == "Look.\nWhich?\nA. x\nB. y"
    assert second["text"] == "Which?\nA. y\nB. x"
    assert (first["circle"], second["circle"], second["question_id"]) == (3, 3, 1_000_003)
    assert (first["image"], second["image"]) == ("3.jpg", "3.jpg")  # the picture of another row
    assert benchmark("mmbench/dev_cn").prompt_of(first, "q").endswith("\n请直接回答选项字母。")


def test_mmbench_without_a_hint_column_and_without_answers(tmp_path: Path) -> None:
    row = {"index": 1, "question": "Q", "A": "x", "B": "None", "image": base64.b64encode(PICTURE).decode()}
    (read,) = read_options(table(tmp_path / "m.tsv", [row]))
    assert read["options"] == {"A": "x", "B": "None"}  # an option may be the word None
    assert "ground_truth" not in read


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image": "9"}, "'9' names none"), ({"index": "one"}, "line 2: the index 'one' is no number")],
)
def test_faults_of_a_table(tmp_path: Path, change: dict, message: str) -> None:
    row = {"index": 1, "question": "Q", "A": "x", "image": base64.b64encode(PICTURE).decode()}
    with pytest.raises(ValueError, match=message):
        read_options(table(tmp_path / "m.tsv", [row | change]))
    with pytest.raises(ValueError, match="has no column 'question'"):
        read_options(table(tmp_path / "n.tsv", [{"index": 1}]))


def test_pictures_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused) -> None:
    file = mmbench_table(tmp_path)
    main([str(file), "--output", str(tmp_path / "pictures")])
    assert "1 pictures" in capsys.readouterr().out
    assert (tmp_path / "pictures/3.jpg").read_bytes() == PICTURE
    damaged = table(tmp_path / "d.tsv", [{"index": 1, "question": "Q", "A": "x", "image": "?" * 80}])
    with pytest.raises(ValueError, match="index 1: the picture is damaged"):
        write_pictures(damaged, tmp_path / "pictures")
    assert "cannot be read" in refused(main, [str(tmp_path / "no.tsv"), "--output", str(tmp_path)])


def test_rows_without_a_question_id(tmp_path: Path) -> None:
    write_rows(tmp_path / "g.jsonl", [{"image_id": "a", "description": "two ships"}])
    (row,) = benchmark("grounding_description").read_questions(tmp_path / "g.jsonl")
    assert row["question_id"] == "a"
    assert json.dumps(row)
