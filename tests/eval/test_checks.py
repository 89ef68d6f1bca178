"""Notes on the input: subsets, truths and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from geochat.eval.benchmark import Benchmark
from geochat.eval.checks import ids_hash, notes
from geochat.eval.files import read_rows

ROWS = [{"question_id": i, "category": "comp" if i else "presence", "ground_truth": "yes"} for i in range(3)]


def lrben(**expected) -> Benchmark:
    return replace(Benchmark.load("lrben"), expected=expected)


def test_a_published_subset_is_recognised_in_any_order() -> None:
    benchmark = lrben(questions=3, ids=ids_hash(range(3)), counts={"category": {"comp": 2, "presence": 1}})
    assert notes(ROWS[::-1], benchmark) == ["the published subset of 3 questions (counts and ids agree)"]
    assert notes(ROWS, lrben(questions=3)) == ["the published subset of 3 questions (counts agree)"]
    assert notes(ROWS, lrben()) == []


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (ROWS[:2], "2 questions, not 3; category comp: 1, not 2"),  # as after a filter on the id
        ([*ROWS[:2], ROWS[2] | {"question_id": 9}], "as many questions, but other ones"),
    ],
)
def test_another_subset_is_named(rows: list[dict], note: str) -> None:
    benchmark = lrben(questions=3, ids=ids_hash(range(3)), counts={"category": {"comp": 2}})
    assert notes(rows, benchmark) == [f"not the published subset: {note}"]


@pytest.mark.parametrize(
    "name", ["UCmerced:ucmerced", "AID:aid", "lrben:lrben", "region_caption:region_captioning"]
)
def test_published_answers_are_of_the_published_subset(published: Path, name: str) -> None:
    file, _, benchmark = name.partition(":")
    rows = read_rows(published / f"{file}_geochat_7b.jsonl")
    (note,) = notes(rows, Benchmark.load(benchmark))
    assert "counts and ids agree" in note
    kept = [row for row in rows if row.get("category", "comp") == "comp"][:-1]
    assert "not the published subset" in notes(kept, Benchmark.load(benchmark))[0]


def test_truths_with_a_stray_end() -> None:
    aid = replace(Benchmark.load("aid"), expected={})
    rows = [{"question_id": f"{name}/a_1.png", "ground_truth": f"{name}gt"} for name in ("Pond", "Resort")]
    assert (
        "every ground_truth ends in a stray \"gt\", as 'Pondgt'; the scores do not use it"
        in notes(rows, aid)[0]
    )
    plain = replace(Benchmark.load("rsvqa/lr"), only={})
    assert "no answer can equal it" in notes(rows, plain)[0]
    assert notes([*rows, rows[0] | {"ground_truth": "Pond"}], plain) == []


def test_pictures_that_are_not_there(tmp_path: Path) -> None:
    benchmark = replace(Benchmark.load("rsvqa/lr"), only={})
    rows = [{"question_id": i, "image": f"{i}.png", "ground_truth": "yes"} for i in range(2)]
    assert notes(rows, benchmark, tmp_path) == [f"2 of 2 pictures are not in {tmp_path}, the first is 0.png"]
    Image.new("RGB", (2, 2)).save(tmp_path / "0.jpg")
    assert "0.jpg is there: mend `image`" in notes(rows, benchmark, tmp_path)[0]
    for row in rows:
        Image.new("RGB", (2, 2)).save(tmp_path / row["image"])
    assert notes(rows, benchmark, tmp_path) == []
    assert notes([{"question_id": 1, "image": "", "ground_truth": "a"}], benchmark, tmp_path) == []
