"""The rules of RSEvalKit (VHM's scorer) as they are coded, faults included: `--scorer rsevalkit`.

Only for comparison with numbers that it printed. What it counts differently from the metrics of this package:

- a part of a word is enough, and an empty answer to a class or VQA question is right, being part of every truth;
- "No" with a capital is no "no"; the first of the capitals A to E is the choice, even the A of "Answer: B";
- an answer without a number, or with another number of numbers, is left out of the mean errors;
- a class that is never named has precision 0; extra labels and colours cost nothing where they are not asked for.

Where the original ends with an error (no letter, no number, no box, no polygon, a count of 0), the answer counts as
wrong or, in mean errors and IoUs, not at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from geochat.eval.quantities import NUMBER_WORDS
from geochat.eval.verdicts import Metric, Question, Summary, Verdict, counted, mean, share

_NUMBER = re.compile(r"[-+]?\d*\.?\d+")
_AREAS = ((32**2, "S"), (96**2, "M"), (float("inf"), "L"))


def _joined(text: object) -> str:
    return str(text).replace(" ", "").lower()


def _right(correct: bool, parsed: bool = True) -> Verdict:
    return {"parsed": parsed, "correct": correct, "perception": float(correct)}


def contains(answer: str, question: Question) -> Verdict:
    """Classes and VQA: the answer is part of the truth."""
    return _right(_joined(answer) in _joined(question.truth))


def presence(answer: str, question: Question) -> Verdict:
    yes, no = "yes" in answer.lower(), "no" in answer or "false" in answer
    said = "unknown" if yes == no else "yes" if yes else "no"
    return _right(said == str(question.truth).lower(), said != "unknown")


def choice(answer: str, question: Question) -> Verdict:
    letter = next((c for c in answer if c in "ABCDE"), None)
    return _right(letter is not None and letter.lower() in str(question.truth).lower(), letter is not None)


def colours(answer: str, question: Question) -> Verdict:
    """The share of the true colours that are part of the answer."""
    wanted = _joined(question.truth).split(",")
    score = sum(colour in _joined(answer) for colour in wanted) / len(wanted)
    return {"parsed": answer.strip() != "", "perception": score}


def _mean_score(verdicts: Sequence[Verdict]) -> Summary:
    return counted(verdicts) | {"perception": mean([v["perception"] for v in verdicts])}


@cache
def _hyphenated() -> dict[str, int]:
    return {word.replace(" ", "-"): number for word, number in NUMBER_WORDS.items()}


def count(answer: str, question: Question) -> Verdict:
    """The first digits, else the first word (between spaces) that is a number word."""
    truth = int(question.truth)
    digits = re.search(r"\d+", answer)
    words = [_hyphenated()[word] for word in answer.lower().split() if word in _hyphenated()]
    numbers = [int(digits.group())] if digits else words[:1]
    return _errors([truth], numbers)


def measures(answer: str, question: Question) -> Verdict:
    truth, numbers = ([float(n) for n in _NUMBER.findall(str(text))] for text in (question.truth, answer))
    return _errors(truth, numbers)


def _errors(truth: Sequence[float], numbers: Sequence[float]) -> Verdict:
    pairs = list(zip(truth, numbers)) if len(truth) == len(numbers) else []
    return {
        "parsed": bool(pairs),
        "errors": [abs(found - true) for true, found in pairs],
        "relative": [abs(found - true) / abs(true) for true, found in pairs if true],
    }


def _mean_errors(verdicts: Sequence[Verdict]) -> Summary:
    return counted(verdicts) | {
        "mean_absolute_error": mean([e for v in verdicts for e in v["errors"]]),
        "mean_relative_error": mean([e for v in verdicts for e in v["relative"]]),
    }


def _bracketed(text: str) -> list[float]:
    """The numbers between the first "[" and the last "]"."""
    start, end = text.find("["), text.rfind("]")
    return [float(n) for n in _NUMBER.findall(text[start : end + 1])] if start != -1 != end else []


def box(answer: str, question: Question) -> Verdict:
    """The first four numbers, in thousandths, against the true upright box in pixels."""
    if question.size is None:
        raise ValueError("the image's width and height are needed to place boxes given in thousandths")
    width, height = question.size
    truth, numbers = _bracketed(str(question.truth))[:4], _bracketed(answer)[:4]
    if len(truth) < 4:
        raise ValueError(f"the truth {question.truth!r:.80} holds no box [x1, y1, x2, y2]")
    iou = 0.0
    if parsed := len(numbers) == 4:
        iou = _upright_iou(truth, [n * side / 1000 for n, side in zip(numbers, (width, height) * 2)])
    size = (truth[2] - truth[0]) * (truth[3] - truth[1])
    area = next(name for limit, name in _AREAS if size <= limit)
    return _right(iou >= 0.5, parsed) | {"iou": iou, "strata": {"area": area}}


def _upright_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def _precision(verdicts: Sequence[Verdict]) -> Summary:
    correct = sum(v["correct"] for v in verdicts)
    return counted(verdicts) | {"correct": correct, "precision": share(correct, len(verdicts))}


def labels(answer: str, question: Question) -> Verdict:
    """The classes stand in the question behind the first colon; a class is named when it is part of the text."""
    asked = str(question.row.get("prompt") or question.row.get("text") or "")
    classes = [name.strip() for name in asked[asked.find(":") + 1 : -1].split(",")]
    true, named = ([name for name in classes if name in text] for text in (str(question.truth), answer))
    return {"parsed": bool(named), "classes": classes, "labels": true, "named": named}


def _class_precision(verdicts: Sequence[Verdict]) -> Summary:
    precisions = []
    for name in dict.fromkeys(name for v in verdicts for name in v["classes"]):
        named = [v for v in verdicts if name in v["named"]]
        precisions.append(share(sum(name in v["labels"] for v in named), len(named)) or 0.0)
    return counted(verdicts) | {"average_cp": mean(precisions)}


def polygon(answer: str, question: Question) -> Verdict:
    """Both polygons filled on the pixel grid (by Pillow here, by pycocotools there), y scaled by the width."""
    if question.size is None:
        raise ValueError("the image's width and height are needed to fill polygons given in thousandths")
    truth, points = _bracketed(str(question.truth)), _bracketed(answer)
    if len(truth) < 6 or len(points) < 6:
        return {"parsed": False, "mean_iou": None, "mean_ciou": None}
    first, second = _filled(truth, question.size), _filled(points, question.size)
    union = np.logical_or(first, second).sum()
    iou = float(np.logical_and(first, second).sum() / union) if union else 1.0
    listed, true = len(points) // 2, len(truth) // 2
    likeness = 1 - abs(listed - true) / (listed + true)
    return {"parsed": True, "mean_iou": iou, "mean_ciou": iou * likeness}


def _filled(numbers: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    from PIL import Image, ImageDraw

    scaled = [number * size[0] / 1000 for number in numbers]
    image = Image.new("1", size)
    ImageDraw.Draw(image).polygon(list(zip(scaled[::2], scaled[1::2])), fill=1)
    return np.asarray(image)


def _mean_ious(verdicts: Sequence[Verdict]) -> Summary:
    read = [v for v in verdicts if v["parsed"]]
    return counted(verdicts) | {
        "mean_ciou": mean([v["mean_ciou"] for v in read]),
        "mean_iou": mean([v["mean_iou"] for v in read]),
    }


METRICS = {
    "rsevalkit_contains": Metric(contains, _mean_score, "perception"),
    "rsevalkit_presence": Metric(presence, _mean_score, "perception"),
    "rsevalkit_choice": Metric(choice, _mean_score, "perception"),
    "rsevalkit_colours": Metric(colours, _mean_score, "perception"),
    "rsevalkit_count": Metric(count, _mean_errors, "mean_relative_error"),
    "rsevalkit_measures": Metric(measures, _mean_errors, "mean_relative_error"),
    "rsevalkit_box": Metric(box, _precision, "precision"),
    "rsevalkit_labels": Metric(labels, _class_precision, "average_cp"),
    "rsevalkit_polygon": Metric(polygon, _mean_ious, "mean_ciou"),
}
