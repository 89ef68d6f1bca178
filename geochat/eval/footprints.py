"""Answers that are one polygon, such as a building's footprint: IoU and complexity-aware IoU, exact."""

from __future__ import annotations

import re
from collections.abc import Sequence

from geochat.eval.quantities import parse_measures
from geochat.eval.verdicts import Question, Summary, Verdict, counted, mean


def parse_points(text: str) -> list[tuple[float, float]]:
    """The points between the first "[" and the last "]", as in `[(12, 30), (80, 31), (79, 95)]`; none when fewer than
    three, or when a coordinate has no partner."""
    listed = re.search(r"\[.*\]", text, re.DOTALL)
    numbers = parse_measures(listed.group()) if listed else []
    points = list(zip(numbers[::2], numbers[1::2]))
    return points if len(points) >= 3 and len(numbers) % 2 == 0 else []


def overlap(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """Intersection over union of two polygons, convex or not; one that crosses itself counts by its even-odd area.
    0 when either has no area."""
    from shapely import Polygon, make_valid

    a, b = make_valid(Polygon(first)), make_valid(Polygon(second))
    if not a.area or not b.area:
        return 0.0
    return a.intersection(b).area / a.union(b).area


def judge_footprint(answer: str, question: Question) -> Verdict:
    """C-IoU = IoU · (1 − |N − N'| ÷ (N + N')) with N corners listed and N' true ones (Zorzi et al., PolyWorld,
    CVPR 2022). Both sides
    in the same unit of the image's width and height: the ratio does not depend on it."""
    truth, points = parse_points(str(question.truth)), parse_points(answer)
    if not truth:
        raise ValueError(f"the truth {str(question.truth)!r:.80} holds no polygon [(x, y), …]")
    iou = overlap(truth, points) if points else 0.0
    likeness = 1 - abs(len(points) - len(truth)) / (len(points) + len(truth))
    return {"parsed": bool(points), "iou": iou, "c_iou": iou * likeness}


def summarise_footprints(verdicts: Sequence[Verdict]) -> Summary:
    """An answer without a polygon counts as 0."""
    return counted(verdicts) | {
        "c_iou": mean([v["c_iou"] for v in verdicts]),
        "mean_iou": mean([v["iou"] for v in verdicts]),
    }
