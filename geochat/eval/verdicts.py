"""What every scorer shares: the question it is given, the verdict it gives, and figures over many verdicts.

A verdict is a small dict per question that can be written as JSON; a summary is the dict of figures over many. Shares are
fractions of 1; a share of nothing is None. Every summary holds `n`, `parsed` and `failed`, and n = parsed + failed: an
answer that cannot be read counts as wrong, never as absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

IouMode = Literal["rotated", "hbb"]
IOU_MODES: tuple[IouMode, ...] = ("rotated", "hbb")

Verdict = dict[str, Any]
"""`parsed`; `correct` where there is right and wrong; the metric's own fields, under the name of the figure where that is
their mean; `strata` that only the scorer knows."""
Summary = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a scorer may know beside the answer. `truth` as the benchmark gives it; `size` is (width, height) in pixels
    of the original image (boxes only); `labels` are all truths of the question's group, as `bare` writes them."""

    truth: Any
    size: tuple[int, int] | None = None
    labels: frozenset[str] = frozenset()
    iou: IouMode = "rotated"
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row."""


def one_label(truth: Any) -> list[str]:
    return [truth] if isinstance(truth, str) else []


@dataclass(frozen=True)
class Metric:
    judge: Callable[[str, Question], Verdict]
    summarise: Callable[[Sequence[Verdict]], Summary]
    headline: str
    """The key of the summary that stands for the task."""
    needs_truth: bool = True
    labels_of: Callable[[Any], Iterable[str]] = one_label
    """The labels that a truth consists of."""


def counted(verdicts: Sequence[Verdict]) -> Summary:
    parsed = sum(v["parsed"] for v in verdicts)
    return {"n": len(verdicts), "parsed": parsed, "failed": len(verdicts) - parsed}


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def mean(values: Sequence[float]) -> float | None:
    return share(sum(values), len(values))


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float] | None:
    """Wilson's score interval for a share (E. B. Wilson, 1927)."""
    if n == 0:
        return None
    part, spread = correct / n, z * z / n
    centre = (part + spread / 2) / (1 + spread)
    half = math.sqrt(part * (1 - part) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise_accuracy(verdicts: Sequence[Verdict]) -> Summary:
    """Micro average: right answers ÷ all questions, with Wilson's 95 % interval; `lenient` where it was judged."""
    n, correct = len(verdicts), sum(v["correct"] for v in verdicts)
    summary = counted(verdicts)
    summary |= {"correct": correct, "accuracy": share(correct, n), "interval95": wilson(correct, n)}
    if verdicts and "lenient" in verdicts[0]:
        summary["accuracy_lenient"] = share(sum(v["lenient"] for v in verdicts), n)
    return summary


def judge_nothing(answer: str, question: Question) -> Verdict:
    """For questions whose truth only a server knows: whether there is an answer."""
    said = answer.strip() != ""
    return {"parsed": said, "answered": said}


def summarise_nothing(verdicts: Sequence[Verdict]) -> Summary:
    summary = counted(verdicts)
    return summary | {"answered": share(summary["parsed"], summary["n"])}
