"""Answers that are numbers: counts, and measurements such as lengths or ground sampling distances."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from geochat.eval.verdicts import Question, Summary, Verdict, mean, summarise_accuracy

# fmt: off
_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
          "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
# fmt: on
_NUMBERS = {word: i for i, word in enumerate(_UNITS)} | _TENS
_NUMBERS |= {f"{ten} {_UNITS[i]}": value + i for ten, value in _TENS.items() for i in range(1, 10)}
NUMBER_WORDS: dict[str, int] = _NUMBERS
"""English number words from zero to ninety-nine; two-word numbers with a space."""

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+"
_MEASURES = re.compile(rf"(?:(?<![\w.])[-+])?(?:{_DIGITS})")

RANGES = (0, 2, 6, 12)
"""Counts are also judged by range: 0, 1–2, 3–6, 7–12, above (the limits are RSEvalKit's)."""


def parse_count(text: str) -> float | None:
    """The first number of a text, in digits ("1,000", "2.5") or words ("twenty-one"; "no" and "none" are 0)."""
    if digits := re.search(_DIGITS, text):
        return float(digits.group().replace(",", ""))
    words = re.findall(r"[a-z]+", text.lower())
    for first, second in zip(words, [*words[1:], ""]):
        for phrase in (f"{first} {second}", first):
            if phrase in NUMBER_WORDS:
                return float(NUMBER_WORDS[phrase])
    return 0.0 if {"no", "none"} & set(words) else None


def parse_measures(text: str) -> list[float]:
    """All numbers of a text in digits, whatever unit follows: "41.15m by 1,038.89m" → [41.15, 1038.89]."""
    return [float(number.replace(",", "")) for number in _MEASURES.findall(text)]


def judge_count(answer: str, question: Question) -> Verdict:
    truth, number = parse_count(str(question.truth)), parse_count(answer)
    if truth is None:
        raise ValueError(f"the truth {question.truth!r} is no number")
    return {
        "parsed": number is not None,
        "correct": number == truth,
        "errors": [] if number is None else [abs(number - truth)],
        "relative": [] if number is None or not truth else [abs(number - truth) / abs(truth)],
        "strata": {"range": _range(truth)},
    }


def judge_measures(answer: str, question: Question) -> Verdict:
    """Numbers in the order in which they stand; read when the answer has as many as the truth."""
    truth, numbers = parse_measures(str(question.truth)), parse_measures(answer)
    if not truth:
        raise ValueError(f"the truth {question.truth!r} holds no number")
    pairs = list(zip(truth, numbers)) if len(truth) == len(numbers) else []
    return {
        "parsed": bool(pairs),
        "correct": numbers == truth,
        "errors": [abs(found - true) for true, found in pairs],
        "relative": [abs(found - true) / abs(true) for true, found in pairs if true],
    }


def summarise_errors(verdicts: Sequence[Verdict]) -> Summary:
    """Accuracy over all questions. The mean errors are over the numbers that could be read: they mean little where
    `failed` is large. The relative error leaves out a truth of 0."""
    errors = [error for v in verdicts for error in v["errors"]]
    relative = [error for v in verdicts for error in v["relative"]]
    return summarise_accuracy(verdicts) | {
        "mean_absolute_error": mean(errors),
        "mean_relative_error": mean(relative),
    }


def _range(count: float) -> str:
    if count <= 0:
        return "0"
    for low, high in pairwise(RANGES):
        if count <= high:
            return f"{low + 1}–{high}"
    return f"above {RANGES[-1]}"
