"""The published programs' rules, fault by fault, beside what this package says of the same answer."""

from __future__ import annotations

import numpy as np
import pytest

from geochat.data.boxes import Box
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import Question


def judged(metric: str, pairs: list[tuple[str, object]], **given) -> dict:
    """The summary of answers and truths."""
    chosen = METRICS[metric]
    return chosen.summarise([chosen.judge(answer, Question(truth, **given)) for answer, truth in pairs])


# -- RSEvalKit


def test_part_of_the_truth_is_right() -> None:
    pairs = [("", "river"), ("r", "river"), ("Dense Residential", "denseresidential"), ("Yes.", "yes")]
    assert judged("rsevalkit_contains", pairs)["perception"] == 0.75
    assert judged("exact_match", pairs)["accuracy"] == 0.5


def test_presence_does_not_know_a_capital_no() -> None:
    pairs = [("No", "no"), ("no", "no"), ("Yes, north of it", "yes"), ("yes", "yes")]
    assert judged("rsevalkit_presence", pairs)["perception"] == 0.5
    assert judged("yes_no", pairs)["accuracy"] == 1


def test_the_first_capital_is_the_choice() -> None:
    pairs = [("Answer: B", "A. left"), ("Answer: B", "B. center"), ("left", "A. left"), ("C", "B. center")]
    row = {"prompt": "A. left\nB. center"}
    theirs, ours = (
        [METRICS[name].judge(answer, Question(truth, row=row))["correct"] for answer, truth in pairs]
        for name in ("rsevalkit_choice", "option")
    )
    assert theirs == [True, False, False, True]  # the "c" of "center" is enough
    assert ours == [False, True, True, False]


def test_extra_colours_cost_nothing() -> None:
    summary = judged(
        "rsevalkit_colours", [("white, red, green", "white, red"), ("red", "white,red"), ("", "red")]
    )
    assert (summary["perception"], summary["failed"]) == (0.5, 1)


def test_counts_without_a_number_are_left_out() -> None:
    pairs = [("1,000", "1000"), ("twenty-one", "21"), ("twenty one", "21"), ("many", "3")]
    summary = judged("rsevalkit_count", pairs)
    assert (summary["n"], summary["failed"]) == (4, 1)
    assert summary["mean_absolute_error"] == (999 + 0 + 1) / 3
    ours = judged("count", pairs)
    assert (ours["correct"], ours["failed"], ours["mean_absolute_error"]) == (3, 1, 0)
    assert judged("rsevalkit_count", [("3", "0")])["mean_relative_error"] is None  # there: a division by zero


def test_measures_of_another_number_are_left_out() -> None:
    summary = judged("rsevalkit_measures", [("44m by 20m", "40m, 20m"), ("44m", "40m, 20m")])
    assert (summary["mean_absolute_error"], summary["failed"]) == (2, 1)


def test_boxes_of_the_first_four_numbers() -> None:
    pairs = [
        ("[100, 100, 200, 200]", "[80, 40, 160, 80]"),
        ("[[1, 2, 3]]", "[0, 0, 9, 9]"),
        ("none", "[0, 0, 9, 9]"),
    ]
    summary = judged("rsevalkit_box", pairs, size=(800, 400))
    assert (summary["n"], summary["failed"], summary["precision"]) == (3, 2, pytest.approx(1 / 3))
    verdict = METRICS["rsevalkit_box"].judge("", Question("[0, 0, 33, 32]", (8, 8)))
    assert verdict["strata"] == {"area": "M"}


def test_class_precision_forgives_what_is_missing() -> None:
    asked = {"prompt": "{IT} Which of these are there: water, forest, town."}
    pairs = [("water", "water, forest, town"), ("water and waterfront", "water")]
    summary = judged("rsevalkit_labels", pairs, row=asked)
    assert summary["average_cp"] == pytest.approx(1 / 3)  # water 1, the never named forest and town 0
    labels = frozenset({"water", "forest", "town"})
    assert judged("labels", pairs, labels=labels)["class_recall"] == pytest.approx(1 / 3)


def test_polygons_y_scaled_by_the_width() -> None:
    square = "[(0, 0), (500, 0), (500, 500), (0, 500)]"
    assert judged("rsevalkit_polygon", [(square, square)], size=(200, 200))["mean_ciou"] == 1
    lower = "[(0, 500), (500, 500), (500, 1000), (0, 1000)]"
    both = [(lower, lower), (square, lower), ("none", lower)]
    summary = judged(
        "rsevalkit_polygon", both, size=(200, 90)
    )  # scaled by 200, the lower half leaves the image
    assert (summary["failed"], summary["mean_ciou"]) == (1, 0.5)
    assert judged("footprint", both)["c_iou"] == pytest.approx(1 / 3)


# -- EarthDial and VRSBench


def test_earthdial_counts_predictions_and_shares_a_truth() -> None:
    truth = Box.parse("{<10><10><40><40>|<90>}").polygon(100, 100).tolist()
    twice, no_box = "{<10><10><40><40>|<90>}" * 2, "nothing there"
    summary = judged("boxes_earthdial", [(twice, [truth]), (no_box, [truth])], size=(100, 100))
    assert summary["precision@0.5"] == 1  # two on one, and silence is free
    ours = judged("boxes", [(twice, [truth]), (no_box, [truth])], size=(100, 100))
    assert (ours["precision@0.5"], ours["recall@0.5"]) == (0.5, 0.5)


def test_earthdial_turns_the_other_way_and_sees_no_negative_number() -> None:
    judge = METRICS["boxes_earthdial"].judge
    long_box = Box(10, 45, 90, 55, 30)
    truth = [long_box.polygon(100, 100).tolist()]
    assert judge(long_box.format(), Question(truth, (100, 100)))["hit"] == 1  # both are turned alike
    # Only beside a box with another angle is the direction seen.
    upright = judge("{<10><45><90><55>|<0>}", Question(truth, (100, 100)))["hit"]
    assert upright == 0
    negative = "{<-3><10><40><40>|<90>}"
    verdict = judge(negative, Question(negative + "{<50><50><60><60>|<90>}", (100, 100)))
    assert (verdict["predicted"], verdict["strata"]["objects"]) == (0, "single")


def test_earthdial_reads_its_own_notation() -> None:
    verdict = METRICS["boxes_earthdial"].judge(
        "[[10, 10, 40, 40, 0]]", Question("[[10, 10, 40, 40, 90], [1, 2, 3, 4, 0]]")
    )
    assert (verdict["hit"], verdict["strata"]["objects"]) == (1, "multi")
    short = METRICS["boxes_earthdial"].judge("[[10, 10, 40, 40]]", Question("[[10, 10, 40, 40, 90]]"))
    assert (short["predicted"], short["hit"]) == (1, 0)


def test_vrsbench_adds_one_to_every_side() -> None:
    pairs = [
        ("{<10><10><11><11>}", "{<12><10><13><11>}"),
        ("{<10><10><12><12>}", "{<11><11><13><13>}"),
        ("", "{<1><1><2><2>}"),
    ]
    summary = judged("boxes_vrsbench", pairs)
    # 3 × 3 points of 2 × 2 shared in the second: 4 ÷ (9 + 9 − 4)
    assert summary["mean_iou"] == pytest.approx(4 / 14 / 3)
    touching = judged("boxes_vrsbench", [("{<10><10><20><20>}", "{<20><10><30><20>}")])
    assert touching["cumulative_iou"] > 0
    polygon = np.array([(20, 10), (30, 10), (30, 20), (20, 20)], dtype=float)
    assert judged("boxes", [("{<10><10><20><20>}", polygon.tolist())], size=(100, 100))["mean_iou"] == 0
    assert (
        judged("boxes_vrsbench", [("{<10><10><15><10>}", (polygon / 2).tolist())], size=(100, 100))["failed"]
        == 0
    )
    with pytest.raises(ValueError, match="width and height"):
        judged("boxes_vrsbench", [("", polygon.tolist())])
