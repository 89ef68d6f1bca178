"""Scorers: (answer text, truth) → verdict, and verdicts → figures. Pure functions; no torch, no files.

A verdict is a small dict per question that can be written as JSON; a summary is the dict of figures over many. Shares are
fractions of 1; a share of nothing is None. Every summary holds `n`, `parsed` and `failed`, and n = parsed + failed: an
answer that cannot be read counts as wrong, never as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from geochat.data.boxes import iou_matrix, parse_boxes

THRESHOLDS = (0.5, 0.25)
IouMode = Literal["rotated", "hbb"]
IOU_MODES: tuple[IouMode, ...] = ("rotated", "hbb")

# fmt: off
_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
          "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
# fmt: on
_NUMBERS = {word: i for i, word in enumerate(_UNITS)} | _TENS
_NUMBERS |= {f"{ten} {_UNITS[i]}": value + i for ten, value in _TENS.items() for i in range(1, 10)}
NUMBER_WORDS: dict[str, int] = _NUMBERS
"""English number words from zero to ninety-nine; two-word numbers with a space."""

Verdict = dict[str, Any]
Summary = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a scorer may know beside the answer. `truth` as the benchmark gives it; `size` is (width, height) in pixels
    of the original image (boxes only); `labels` are all squeezed truths of the question's group (exact match only)."""

    truth: Any
    size: tuple[int, int] | None = None
    labels: frozenset[str] = frozenset()
    iou: IouMode = "rotated"


@dataclass(frozen=True)
class Metric:
    judge: Callable[[str, Question], Verdict]
    summarise: Callable[[Sequence[Verdict]], Summary]
    headline: str
    """The key of the summary that stands for the task."""


# -- text ---------------------------------------------------------------------------------------------------------------


def squeeze(text: object) -> str:
    """GeoChat-Bench's normalisation: lower case, no spaces, no full stops."""
    return re.sub(r"[\s.]+", "", str(text).lower())


def bare(text: object) -> str:
    """Letters and digits alone, lower case: the form in which labels are looked for."""
    return re.sub(r"[\W_]+", "", str(text).lower())


def labels_in(text: str, labels: Iterable[str]) -> set[str]:
    """The labels (in `bare` form) that occur in a text as whole words, the longest first, without overlap.

    Spaces inside a label do not count ("mediumresidential" is found in "Medium residential."), nor does the difference
    between a number word and its digits.
    """
    wanted = set(labels) - {""}
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()))
    widest = min(len(words), max((len(label) for label in wanted), default=0))
    found: set[str] = set()
    start = 0
    while start < len(words):
        for end in range(min(start + widest, len(words)), start, -1):
            number = NUMBER_WORDS.get(" ".join(words[start:end]))
            hit = {"".join(words[start:end]), str(number)} & wanted
            if hit:
                found |= hit
                start = end
                break
        else:
            start += 1
    return found


def judge_exact(answer: str, question: Question) -> Verdict:
    """Strict: equal after `squeeze`. Lenient: the truth is the only label of its group that the answer names."""
    truth = squeeze(question.truth)
    strict = truth != "" and squeeze(answer) == truth
    found = labels_in(answer, {bare(label) for label in question.labels} | {bare(truth)})
    return {"parsed": strict or bool(found), "correct": strict, "lenient": strict or found == {bare(truth)}}


def judge_word(answer: str, question: Question) -> Verdict:
    """The truth occurs in the answer as whole words ("ship" in "1 gray ship at the left"), whatever else does."""
    return {"parsed": bare(answer) != "", "correct": bool(labels_in(answer, {bare(question.truth)}))}


def parse_count(text: str) -> float | None:
    """The first number of a text, in digits ("1,000", "2.5") or words ("twenty-one"; "no" and "none" are 0)."""
    digits = re.search(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?", text)
    if digits:
        return float(digits.group().replace(",", ""))
    words = re.findall(r"[a-z]+", text.lower())
    for first, second in zip(words, [*words[1:], ""]):
        for phrase in (f"{first} {second}", first):
            if phrase in NUMBER_WORDS:
                return float(NUMBER_WORDS[phrase])
    return 0.0 if {"no", "none"} & set(words) else None


def judge_count(answer: str, question: Question) -> Verdict:
    truth, number = parse_count(str(question.truth)), parse_count(answer)
    if truth is None:
        raise ValueError(f"the truth {question.truth!r} is no number")
    error = None if number is None else abs(number - truth)
    return {"parsed": number is not None, "correct": error == 0, "error": error}


def summarise_accuracy(verdicts: Sequence[Verdict]) -> Summary:
    """Micro average: right answers ÷ all questions, with Wilson's 95 % interval; `lenient` where it was judged."""
    summary = _counted(verdicts)
    n, correct = len(verdicts), sum(v["correct"] for v in verdicts)
    summary |= {"correct": correct, "accuracy": _share(correct, n), "interval95": wilson(correct, n)}
    if verdicts and "lenient" in verdicts[0]:
        summary["accuracy_lenient"] = _share(sum(v["lenient"] for v in verdicts), n)
    return summary


def summarise_count(verdicts: Sequence[Verdict]) -> Summary:
    """Accuracy over all questions; the mean absolute error is over the parsed ones, whose number stands beside it."""
    errors = [v["error"] for v in verdicts if v["error"] is not None]
    return summarise_accuracy(verdicts) | {"mean_absolute_error": _share(sum(errors), len(errors))}


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float] | None:
    """Wilson's score interval for a share (E. B. Wilson, 1927)."""
    if n == 0:
        return None
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


# -- boxes --------------------------------------------------------------------------------------------------------------


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


def match_boxes(truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray], iou: IouMode) -> list[float]:
    """The IoU each true polygon gets in the one-to-one matching of the greatest total IoU; 0 for one left over."""
    from scipy.optimize import linear_sum_assignment

    table, ious = iou_matrix(truth, predicted, iou), np.zeros(len(truth))
    rows, columns = linear_sum_assignment(table, maximize=True)
    ious[rows] = table[rows, columns]
    return [round(float(iou), 6) for iou in ious]


def judge_boxes(answer: str, question: Question) -> Verdict:
    """Matched IoU per true box. `first` is the IoU of the first predicted box, when there is one true box."""
    truth, predicted = truth_polygons(question.truth, question.size), _placed(answer, question.size)
    parsed = bool(predicted) or not truth  # where there is nothing to find, no box is a readable answer
    verdict: Verdict = {
        "parsed": parsed,
        "predicted": len(predicted),
        "ious": match_boxes(truth, predicted, question.iou),
    }
    if len(truth) == 1:
        verdict["first"] = match_boxes(truth, predicted[:1], question.iou)[0]
    return verdict


def summarise_boxes(verdicts: Sequence[Verdict]) -> Summary:
    """Instance recall (matched ÷ all true boxes: GeoChat's acc@0.5 as far as it can be inferred), precision, F1, and the
    share of questions with every true box found; `single` is the first box's accuracy on questions with one true box."""
    ious = [iou for v in verdicts for iou in v["ious"]]
    predicted = sum(v["predicted"] for v in verdicts)
    firsts = [v["first"] for v in verdicts if "first" in v]
    summary = _counted(verdicts) | {"true_boxes": len(ious), "predicted_boxes": predicted}
    for threshold in THRESHOLDS:
        hit = sum(iou >= threshold for iou in ious)
        everything = sum(all(iou >= threshold for iou in v["ious"]) for v in verdicts)
        summary |= {
            f"recall@{threshold}": _share(hit, len(ious)),
            f"precision@{threshold}": _share(hit, predicted),
            f"f1@{threshold}": _share(2 * hit, len(ious) + predicted),
            f"all_found@{threshold}": _share(everything, len(verdicts)),
            f"single@{threshold}": _share(sum(first >= threshold for first in firsts), len(firsts)),
        }
    return summary | {"single_questions": len(firsts), "mean_iou": _share(sum(ious), len(ious))}


def _counted(verdicts: Sequence[Verdict]) -> Summary:
    parsed = sum(v["parsed"] for v in verdicts)
    return {"n": len(verdicts), "parsed": parsed, "failed": len(verdicts) - parsed}


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


METRICS: dict[str, Metric] = {
    "exact_match": Metric(judge_exact, summarise_accuracy, "accuracy"),
    "class_word": Metric(judge_word, summarise_accuracy, "accuracy"),
    "count": Metric(judge_count, summarise_count, "accuracy"),
    "boxes": Metric(judge_boxes, summarise_boxes, "recall@0.5"),
}
