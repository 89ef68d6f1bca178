"""Answers that name a label: exact match, a class word, several labels at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from geochat.eval.quantities import NUMBER_WORDS
from geochat.eval.verdicts import Question, Summary, Verdict, counted, mean, share

_SPACES = re.compile(r"[\s.]+")
_NO_LETTERS = re.compile(r"[\W_]+")
_WORDS = re.compile(r"[^\W_]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


def squeeze(text: object) -> str:
    """GeoChat-Bench's normalisation: lower case, no spaces, no full stops."""
    return _SPACES.sub("", str(text).lower())


def bare(text: object) -> str:
    """Letters and digits alone, lower case: the form in which labels are looked for."""
    return _NO_LETTERS.sub("", str(text).lower())


def labels_in(text: str, labels: Iterable[str]) -> set[str]:
    """The labels (in `bare` form) that occur in a text as whole words, the longest first, without overlap.

    Spaces inside a label do not count ("mediumresidential" is found in "Medium residential."), nor does the difference
    between a number word and its digits.
    """
    wanted = frozenset(labels) - {""}
    beginnings = _beginnings(wanted)
    words = _WORDS.findall(_THOUSANDS.sub("", text.lower()))
    found: set[str] = set()
    start = 0
    while start < len(words):
        longest = 1
        if words[start] in beginnings or words[start] in NUMBER_WORDS:
            hits = [hit for hit in _readings(words, start, beginnings) if hit[1] in wanted]
            longest = max((length for length, _ in hits), default=1)
            found |= {name for length, name in hits if length == longest}
        start += longest
    return found


def _readings(words: Sequence[str], start: int, beginnings: frozenset[str]) -> Iterator[tuple[int, str]]:
    """What the words from `start` on may name: (number of words, name)."""
    joined = ""
    for length, word in enumerate(words[start:], 1):
        joined += word
        if joined not in beginnings:
            break
        yield length, joined
    for length in (1, 2):
        if (number := NUMBER_WORDS.get(" ".join(words[start : start + length]))) is not None:
            yield length, str(number)


@lru_cache(maxsize=64)
def _beginnings(labels: frozenset[str]) -> frozenset[str]:
    return frozenset(label[:end] for label in labels for end in range(1, len(label) + 1))


@lru_cache(maxsize=65536)  # the answers to a benchmark are few different ones
def _exact(answer: str, truth: str, labels: frozenset[str]) -> tuple[bool, bool, bool]:
    """Whether the answer was read, is strictly right, is leniently right."""
    strict = squeeze(truth) != "" and squeeze(answer) == squeeze(truth)
    label = bare(truth)
    found = labels_in(answer, labels if label in labels else labels | {label})
    return strict or bool(found), strict, strict or found == {label}


def judge_exact(answer: str, question: Question) -> Verdict:
    """Strict: equal after `squeeze`. Lenient: the truth is the only label of its group that the answer names."""
    parsed, strict, lenient = _exact(answer, str(question.truth), question.labels)
    return {"parsed": parsed, "correct": strict, "lenient": lenient}


def judge_word(answer: str, question: Question) -> Verdict:
    """The truth occurs in the answer as whole words ("ship" in "1 gray ship at the left"), whatever else does."""
    return {"parsed": bare(answer) != "", "correct": bool(labels_in(answer, {bare(question.truth)}))}


def split_labels(truth: Any) -> list[str]:
    """The labels of a truth that lists several: "water, forest." or a list. Raises: ValueError when it lists none."""
    parts = truth if isinstance(truth, list) else re.split(r"[,;]|\band\b", str(truth).strip().rstrip("."))
    if not (labels := [str(part).strip() for part in parts if bare(part)]):
        raise ValueError(f"the truth {truth!r} lists no label")
    return labels


def judge_labels(answer: str, question: Question) -> Verdict:
    """Labels as a set; `correct` when the two sets are equal."""
    truth = {bare(label) for label in split_labels(question.truth)}
    found = labels_in(answer, question.labels | truth)
    return {
        "parsed": bool(found),
        "correct": found == truth,
        "sample_f1": 2 * len(truth & found) / (len(truth) + len(found)),
        "labels": sorted(truth),
        "named": sorted(found),
    }


def summarise_labels(verdicts: Sequence[Verdict]) -> Summary:
    """Per class over all questions, then the mean over classes: precision ("CP"), recall, F1. A class that is never
    named has precision 0. `found` is the mean share of a question's labels that its answer names."""
    classes = sorted({label for v in verdicts for label in v["labels"]})
    precisions, recalls, scores = [], [], []
    for label in classes:
        true = sum(label in v["labels"] for v in verdicts)
        named = sum(label in v["named"] for v in verdicts)
        hit = sum(label in v["labels"] and label in v["named"] for v in verdicts)
        precisions.append(share(hit, named) or 0.0)
        recalls.append(hit / true)
        scores.append(2 * hit / (true + named))
    found = [len({*v["labels"]} & {*v["named"]}) / len(v["labels"]) for v in verdicts]
    return counted(verdicts) | {
        "classes": len(classes),
        "class_f1": mean(scores),
        "class_precision": mean(precisions),
        "class_recall": mean(recalls),
        "sample_f1": mean([v["sample_f1"] for v in verdicts]),
        "found": mean(found),
        "all_right": share(sum(v["correct"] for v in verdicts), len(verdicts)),
    }
