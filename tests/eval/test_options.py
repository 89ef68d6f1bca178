"""Answers that choose: letters, circular questions, yes and no, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.eval.metrics import METRICS
from geochat.eval.options import (
    judge_circular,
    judge_llava_option,
    judge_llava_yes_no,
    judge_option,
    judge_refusal,
    judge_xtuner,
    judge_yes_no,
    options_of,
    parse_letter,
    parse_yes_no,
)
from geochat.eval.verdicts import Question

OPTIONS = {"A": "top left", "B": "center", "C": "bottom right"}
ASKED = "Where is the ship?\nA. top left\nB. center\nC. bottom right"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B. center", "B"), ("B: center", "B"), ("B\nbecause", "B"),
        ("The answer is B.", "B"), ("Answer: C", "C"), ("The correct option is (C)", "C"), ("Center", "B"), ("center.", "B"),
        ("", None), ("b", None), ("A ship lies there", None), ("E.g. there", None), ("The answer is a ship", None),
        ("answer is B, or the answer is C", None), ("somewhere", None),
    ],
)  # fmt: skip
def test_the_chosen_letter(answer: str, letter: str | None) -> None:
    assert parse_letter(answer, OPTIONS) == letter


@given(st.text())
def test_any_answer_to_options_gets_a_verdict(answer: str) -> None:
    verdict = judge_option(answer, Question("B", row={"prompt": ASKED}))
    assert not verdict["correct"] or verdict["parsed"]


def test_options_are_read_from_the_question() -> None:
    assert options_of(ASKED) == OPTIONS
    assert options_of("Type? A. Color B. False color C. SAR") == {
        "A": "Color",
        "B": "False color",
        "C": "SAR",
    }


def test_an_option_question() -> None:
    question = Question("B. center", row={"prompt": ASKED})
    verdicts = [judge_option(answer, question) for answer in ("Answer: B", "A", "", "center")]
    assert [v["correct"] for v in verdicts] == [True, False, False, True]
    assert METRICS["option"].summarise(verdicts)["failed"] == 1
    # A letter that only occurs in the words of the truth is not the truth.
    assert not judge_option("C", question)["correct"]
    with pytest.raises(ValueError, match="names no option"):
        judge_option("A", Question("somewhere"))


def turn(index: int, answer: str, truth: str = "A") -> dict:
    row = {"circle": index % 1_000_000, "options": {"A": "x", "B": "y"}}
    return judge_circular(answer, Question(truth, row=row))


def test_a_circular_question_needs_all_its_turns() -> None:
    verdicts = [
        turn(1, "A"),
        turn(1_000_001, "B", "B"),
        turn(2, "A"),
        turn(1_000_002, "A", "B"),
        turn(3, "A"),
    ]
    summary = METRICS["circular"].summarise(verdicts[::-1])  # in whatever order the rows come
    assert (summary["questions"], summary["circular_accuracy"]) == (3, pytest.approx(2 / 3))
    assert summary["accuracy"] == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="`options` and `circle`"):
        judge_circular("A", Question("A"))


def test_a_missing_turn_is_noticed() -> None:
    three = {"circle": 1, "options": {"A": "x", "B": "y", "C": "z"}}
    verdicts = [judge_circular("A", Question("A", row=three))] * 2 + [
        turn(2, "A"),
        turn(2, "A"),
        turn(3, "A"),
    ]
    assert METRICS["circular"].summarise(verdicts)["incomplete"] == 2
    assert (
        METRICS["circular"].summarise(verdicts[-1:])["incomplete"] == 0
    )  # a file without turns, as CCBench's


def test_letters_beyond_d_and_inside_words() -> None:
    row = {"circle": 1, "options": dict(zip("ABCDE", "vwxyz"))}
    for answer, truth in (("E", "E"), ("Answer: C", "C")):
        assert judge_circular(answer, Question(truth, row=row))["correct"]
        assert not judge_xtuner(answer, Question(truth, row=row))["correct"]  # as the original has it


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"), ("No", "no"), ("no, it is not", "no"), ("Yes, north of it", "yes"), ("Not at all", "no"),
        ("False", "no"), ("Yes. There is no doubt", "yes"), ("unknown", None), ("", None), ("north", None),
    ],
)  # fmt: skip
def test_yes_and_no(answer: str, said: str | None) -> None:
    assert parse_yes_no(answer) == said


def test_yes_no_figures_counted_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("No", "no"), ("maybe", "no")]
    verdicts = [judge_yes_no(answer, Question(truth)) for answer, truth in pairs]
    summary = METRICS["yes_no"].summarise(verdicts)
    assert (summary["n"], summary["failed"], summary["accuracy"]) == (5, 1, 0.4)
    assert (summary["precision"], summary["recall"], summary["f1"]) == (0.5, 0.5, 0.5)
    assert summary["yes_share"] == 0.4
    with pytest.raises(ValueError, match="neither yes nor no"):
        judge_yes_no("yes", Question("perhaps"))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Sorry, there is no tennis court in the image.", True),
        ("The tennis court is not visible.", True),
        ("I cannot tell its colour.", True),
        ("I can’t tell.", True),
        ("Green", False),
        ("", False),
    ],
)
def test_refusals(answer: str, right: bool) -> None:
    truth = "The tennis court is invisible in the provided image, so I cannot provide an answer."
    assert judge_refusal(answer, Question(truth))["correct"] is right
    assert judge_refusal("Green", Question("green"))["correct"]


@pytest.mark.parametrize(
    ("answer", "ours", "theirs"),
    [
        ("B", True, True), ("B. center", True, True), ("The answer is B.", True, True),
        ("Answer: B", True, False), ("center", True, False), ("(B)", True, False), ("The answer is B. The answer is C.", False, False),
    ],
)  # fmt: skip
def test_options_as_llava_reads_them(answer: str, ours: bool, theirs: bool) -> None:
    question = Question("B", row={"options": OPTIONS})
    assert judge_option(answer, question)["correct"] is ours
    assert judge_llava_option(answer, question)["correct"] is theirs


@pytest.mark.parametrize(
    ("answer", "ours", "theirs"),
    [
        ("No, none", "no", "no"),
        ("There is a ship", None, "yes"),
        ("NO", "no", "yes"),
        ("Yes. Not two", "yes", "yes"),
    ],
)
def test_yes_and_no_as_llava_reads_them(answer: str, ours: str | None, theirs: str) -> None:
    assert judge_yes_no(answer, Question("yes"))["said"] == ours
    verdict = judge_llava_yes_no(answer, Question("yes"))
    assert (verdict["said"], verdict["correct"], verdict["parsed"]) == (
        theirs,
        theirs == "yes",
        ours is not None,
    )
