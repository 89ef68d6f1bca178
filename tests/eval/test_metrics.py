"""What holds for every metric: a perfect answer, any text, and no answers at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geochat.eval.metrics import METRICS, Question

BOX = [[10.0, 10.0], [40.0, 10.0], [40.0, 40.0], [10.0, 40.0]]
POLYGON = "[(0, 0), (1000, 0), (1000, 1000), (0, 1000)]"
OPTIONS = {"circle": 1, "options": {"A": "left", "B": "right"}}
ASKED = {"prompt": "Which are there: water, forest."}

EXAMPLES: dict[str, tuple[str, Question]] = {
    "exact_match": ("River.", Question("river")),
    "class_word": ("a ship", Question("ship")),
    "labels": ("water and forest", Question("water, forest")),
    "count": ("three", Question("3")),
    "measures": ("3 m by 4 m", Question("3m, 4m")),
    "boxes": ("{<10><10><40><40>|<90>}", Question([BOX], (100, 100))),
    "boxes_permille": ("[[100, 100, 400, 400]]", Question("[10, 10, 40, 40]", (100, 100))),
    "footprint": (POLYGON, Question(POLYGON)),
    "caption": ("1 ship", Question("1 ship")),
    "description": ("1 ship", Question("1 ship")),
    "option": ("B", Question("B", row=OPTIONS)),
    "circular": ("B. right", Question("B", row=OPTIONS)),
    "yes_no": ("Yes", Question("yes")),
    "refusal": ("It is not visible.", Question("The ship is invisible.")),
    "vqa": ("yes", Question(["yes"] * 10)),
    "none": ("anything", Question(None)),
    "llava_option": ("B", Question("B", row=OPTIONS)),
    "llava_yes_no": ("Yes", Question("yes")),
    "xtuner_circular": ("B", Question("B", row=OPTIONS)),
    "boxes_earthdial": ("{<10><10><40><40>|<90>}", Question([BOX], (100, 100))),
    "boxes_vrsbench": ("{<10><10><40><40>|<90>}", Question([BOX], (100, 100))),
    "rsevalkit_contains": ("river", Question("river")),
    "rsevalkit_presence": ("yes", Question("yes")),
    "rsevalkit_choice": ("B", Question("B")),
    "rsevalkit_colours": ("white, red", Question("white,red")),
    "rsevalkit_count": ("3", Question("3")),
    "rsevalkit_measures": ("3 m by 4 m", Question("3m, 4m")),
    "rsevalkit_box": ("[[100, 100, 400, 400]]", Question("[10, 10, 40, 40]", (100, 100))),
    "rsevalkit_labels": ("water, forest", Question("water, forest", row=ASKED)),
    "rsevalkit_polygon": (POLYGON, Question(POLYGON, (50, 50))),
}
LOWER_IS_BETTER = {"measures", "rsevalkit_count", "rsevalkit_measures"}


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_answer(name: str) -> None:
    metric, (answer, question) = METRICS[name], EXAMPLES[name]
    summary = metric.summarise([metric.judge(answer, question)])
    best = {
        "caption": 1.0,
        "description": pytest.approx(0.9375),
    }  # METEOR's penalty for one chunk of two words
    assert summary[metric.headline] == (0 if name in LOWER_IS_BETTER else best.get(name, 1))
    assert (summary["n"], summary["parsed"], summary["failed"]) == (1, 1, 0)


@pytest.mark.parametrize("name", METRICS)
def test_no_answers_are_no_division(name: str) -> None:
    summary = METRICS[name].summarise([])
    assert (summary["n"], summary["parsed"], summary["failed"]) == (0, 0, 0)
    assert METRICS[name].headline in summary


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_answer_is_counted(name: str) -> None:
    metric, (answer, question) = METRICS[name], EXAMPLES[name]
    summary = metric.summarise([metric.judge(text, question) for text in (answer, "")])
    failed = 0 if name == "rsevalkit_contains" else 1  # there, the empty answer is part of every truth
    assert (summary["n"], summary["failed"]) == (2, failed)


words = st.lists(
    st.sampled_from([*"ABCDE", "{<1><2>", "<3><4>|<5>}", "[[1,", "2, 3, 4]]", "(5,", "6)]", "yes", "no", "-7.5", "٣",
                     "twenty", "one", "1,000", "\\", "\n", ".", "<p>", "²"]) | st.text(max_size=4), max_size=12,
).map(" ".join)  # fmt: skip


@settings(max_examples=50)
@given(st.sampled_from(sorted(METRICS)), words)
def test_any_answer_gets_a_verdict(name: str, answer: str) -> None:
    metric, (_, question) = METRICS[name], EXAMPLES[name]
    verdict = metric.judge(answer, question)
    json.dumps(verdict)
    summary = metric.summarise([verdict])
    assert summary["n"] == 1 == summary["parsed"] + summary["failed"]
    errors = ("mean_absolute_error", "mean_relative_error")
    shares = [value for key, value in summary.items() if isinstance(value, float) and key not in errors]
    assert all(0 <= share <= 1 for share in shares)
