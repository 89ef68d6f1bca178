"""VQA accuracy and its normalisation, case by case."""

from __future__ import annotations

import pytest

from geochat.eval.evalai import judge_vqa, normalise, vqa_accuracy
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import Question


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog.", "dog"),
        ("two cats", "2 cats"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # both apostrophes missing: not in the server's table
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),  # the look-behind that should spare it never fails
        ("dog's", "dog 's"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("a\nb", "b"),
        ("yes!", "yes"),
        ("is it - or not", "is it or not"),
    ],
)
def test_normalisation(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_only_32_full_stops_are_removed() -> None:
    assert normalise("." * 40) == "." * 8


@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_leaves_one_person_out(equal: int, score: float) -> None:
    people = ["Dog"] * equal + [f"cat {i}" for i in range(10 - equal)]
    assert vqa_accuracy("the dog", people) == pytest.approx(score)


def test_verdicts() -> None:
    verdicts = [judge_vqa(answer, Question(["dog"] * 10)) for answer in ("dog", "")]
    summary = METRICS["vqa"].summarise(verdicts)
    assert summary == {"n": 2, "parsed": 1, "failed": 1, "vqa_accuracy": 0.5}
    with pytest.raises(ValueError, match="list of people's answers"):
        judge_vqa("dog", Question("dog"))
