"""Two published ways to score boxes, faults included: `--match earthdial` and `--match vrsbench`.

Only for comparison with numbers that these programs printed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from geochat.data.boxes import Box, parse_boxes
from geochat.eval.boxes import truth_polygons
from geochat.eval.verdicts import Metric, Question, Summary, Verdict, counted, mean, share

_LISTED = re.compile(r"\[\s*(\d+(?:,\s*\d+)*)\s*\]")
VRSBENCH_THRESHOLDS = (0.5, 0.7)


def _earthdial_boxes(text: str) -> list[Box]:
    """Boxes of either notation in whole percent; those with a negative number are not seen. A list of another length
    is one that nothing meets."""
    boxes = parse_boxes(text)
    if not boxes:
        rows = [[float(n) for n in row.split(",")] for row in _LISTED.findall(text)]
        boxes = [Box(*row) if len(row) == 5 else Box(0, 0, 0, 0) for row in rows]
    return [box for box in boxes if min(box.x1, box.y1, box.x2, box.y2, box.angle) >= 0]


def _turned_back(box: Box) -> Box:
    """The rotation of the original runs anticlockwise on screen."""
    return Box(box.x1, box.y1, box.x2, box.y2, -box.angle)


def judge_earthdial(answer: str, question: Question) -> Verdict:
    """A predicted box is right when its IoU with any true box is at least 0.5; several may share one."""
    truth = question.truth
    if not isinstance(truth, str):
        truth = "".join(Box.from_polygon(polygon, 100, 100).format() for polygon in _in_percent(question))
    given = [_turned_back(box) for box in _earthdial_boxes(truth)]
    predicted = [_turned_back(box) for box in _earthdial_boxes(answer)]
    hit = sum(any(box.iou(true, 100, 100) >= 0.5 for true in given) for box in predicted)
    return {
        "parsed": bool(predicted),
        "predicted": len(predicted),
        "hit": hit,
        "strata": {"objects": "single" if len(given) == 1 else "multi"},
    }


def summarise_earthdial(verdicts: Sequence[Verdict]) -> Summary:
    """Hits ÷ predicted boxes: an answer without a box costs nothing."""
    hit, predicted = sum(v["hit"] for v in verdicts), sum(v["predicted"] for v in verdicts)
    return counted(verdicts) | {
        "predicted_boxes": predicted,
        "hit": hit,
        "precision@0.5": share(hit, predicted),
    }


def _in_percent(question: Question) -> list[np.ndarray]:
    """The true polygons in percent of the image, which has no shape then: both programs took it for square."""
    if question.size is None:
        raise ValueError("the image's width and height are needed to write the true boxes in percent")
    width, height = question.size
    return [polygon * (100 / width, 100 / height) for polygon in truth_polygons(question.truth)]


def _vrsbench_box(text: str) -> list[int]:
    """The first four runs of digits: a minus sign is not seen, an angle is not read."""
    return [int(digits) for digits in re.findall(r"\d+", text)[:4]]


def judge_vrsbench(answer: str, question: Question) -> Verdict:
    """The first box against the first true one, upright, on the grid of whole percent, each side counted one longer."""
    truth = question.truth
    if not isinstance(truth, str):
        if not (polygons := _in_percent(question)):
            raise ValueError("VRSBench's rule needs a true box for every question")
        polygon = polygons[0]
        truth = str([round(float(value)) for value in (*polygon.min(axis=0), *polygon.max(axis=0))])
    true, box = _vrsbench_box(truth), _vrsbench_box(answer)
    parsed = len(box) == 4 == len(true)
    shared, union = _plus_one(true, box) if parsed else (0, 0)
    iou = share(shared, union) or 0.0
    return {"parsed": parsed, "iou": iou, "shared": shared, "union": union}


def _plus_one(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """Intersection and union with one added to every side."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height, sum(areas) - width * height


def summarise_vrsbench(verdicts: Sequence[Verdict]) -> Summary:
    ious = [v["iou"] for v in verdicts]
    hits = {f"accuracy@{t}": share(sum(iou >= t for iou in ious), len(ious)) for t in VRSBENCH_THRESHOLDS}
    cumulative = share(sum(v["shared"] for v in verdicts), sum(v["union"] for v in verdicts))
    return counted(verdicts) | hits | {"mean_iou": mean(ious), "cumulative_iou": cumulative}


METRICS = {
    "boxes_earthdial": Metric(judge_earthdial, summarise_earthdial, "precision@0.5"),
    "boxes_vrsbench": Metric(judge_vrsbench, summarise_vrsbench, "accuracy@0.5"),
}
