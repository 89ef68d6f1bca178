"""Answers that are boxes: one-to-one matching by exact IoU. Two notations: GeoChat's turned boxes in percent, and VHM's
upright `[x1, y1, x2, y2]` in thousandths of the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from geochat.data.boxes import iou_matrix, parse_boxes
from geochat.data.geometry import area
from geochat.eval.verdicts import IouMode, Question, Summary, Verdict, counted, mean, share

THRESHOLDS = (0.5, 0.25)
AREAS = {32**2: "S", 96**2: "M"}
"""Upper limits in square pixels of COCO's small and medium boxes."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_QUADRUPLE = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


def truth_polygons(truth: Any, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Polygons [4, 2] in pixels from a list of them, from one of them, or from box text in percent (needs `size`)."""
    if isinstance(truth, str):
        return _placed(truth, size)
    array = np.asarray(truth, dtype=float)
    if array.ndim == 2:
        array = array[None]
    if array.size and array.shape[1:] != (4, 2):
        raise ValueError(f"boxes must be lists of four [x, y] corners, not of shape {list(array.shape[1:])}")
    return list(array)


def _placed(text: str, size: tuple[int, int] | None) -> list[np.ndarray]:
    boxes = parse_boxes(text)
    if boxes and size is None:
        raise ValueError("the image's width and height are needed to place boxes given in percent")
    return [box.polygon(*size) for box in boxes] if size else []


def upright(text: str) -> list[tuple[float, float, float, float]]:
    """All `[x1, y1, x2, y2]` of a text, as they stand."""
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in _QUADRUPLE.findall(text)]


def corners(x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], dtype=float)


def match_boxes(truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray], iou: IouMode) -> list[float]:
    """The IoU each true polygon gets in the one-to-one matching of the greatest total IoU; 0 for one left over."""
    return _matched(iou_matrix(truth, predicted, iou))


def _matched(table: np.ndarray) -> list[float]:
    if len(table) == 1:
        return [round(float(table.max(initial=0.0)), 6)]
    from scipy.optimize import linear_sum_assignment

    ious = np.zeros(len(table))
    rows, columns = linear_sum_assignment(table, maximize=True)
    ious[rows] = table[rows, columns]
    return [round(float(iou), 6) for iou in ious]


def judge_boxes(answer: str, question: Question) -> Verdict:
    """GeoChat's boxes against polygons in pixels."""
    return _judge(truth_polygons(question.truth, question.size), _placed(answer, question.size), question.iou)


def judge_permille(answer: str, question: Question) -> Verdict:
    """Upright boxes in thousandths of the image against upright boxes in pixels; both may be text."""
    truth = question.truth
    given = upright(truth) if isinstance(truth, str) else [truth] if np.ndim(truth) == 1 else truth
    if question.size is None:
        raise ValueError("the image's width and height are needed to place boxes given in thousandths")
    if not len(given) or any(len(box) != 4 for box in given):
        raise ValueError(f"the truth {truth!r:.80} holds no box [x1, y1, x2, y2]")
    x, y = question.size[0] / 1000, question.size[1] / 1000
    predicted = [corners(a * x, b * y, c * x, d * y) for a, b, c, d in upright(answer)]
    return _judge([corners(*box) for box in given], predicted, question.iou)


def _judge(truth: list[np.ndarray], predicted: list[np.ndarray], iou: IouMode) -> Verdict:
    """Matched IoU per true box. `first` is the IoU of the first predicted box, when there is one true box."""
    table = iou_matrix(truth, predicted, iou)
    verdict: Verdict = {
        # Where there is nothing to find, no box is a readable answer.
        "parsed": bool(predicted) or not truth,
        "predicted": len(predicted),
        "ious": _matched(table),
        "strata": {"objects": {0: "none", 1: "single"}.get(len(truth), "multi")},
    }
    if len(truth) == 1:
        verdict["first"] = _matched(table[:, :1])[0]
        size = abs(area(truth[0].tolist()))
        verdict["strata"]["area"] = next((name for limit, name in AREAS.items() if size <= limit), "L")
    return verdict


def summarise_boxes(verdicts: Sequence[Verdict]) -> Summary:
    """Instance recall (matched ÷ all true boxes: GeoChat's acc@0.5 as far as it can be inferred), precision, F1, and the
    share of questions with every true box found; `single` is the first box's accuracy on questions with one true box."""
    ious = [iou for v in verdicts for iou in v["ious"]]
    predicted = sum(v["predicted"] for v in verdicts)
    firsts = [v["first"] for v in verdicts if "first" in v]
    summary = counted(verdicts) | {"true_boxes": len(ious), "predicted_boxes": predicted}
    for threshold in THRESHOLDS:
        hit = sum(iou >= threshold for iou in ious)
        everything = sum(all(iou >= threshold for iou in v["ious"]) for v in verdicts)
        summary |= {
            f"recall@{threshold}": share(hit, len(ious)),
            f"precision@{threshold}": share(hit, predicted),
            f"f1@{threshold}": share(2 * hit, len(ious) + predicted),
            f"all_found@{threshold}": share(everything, len(verdicts)),
            f"single@{threshold}": share(sum(first >= threshold for first in firsts), len(firsts)),
        }
    return summary | {"single_questions": len(firsts), "mean_iou": mean(ious)}
