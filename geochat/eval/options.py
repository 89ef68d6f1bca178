"""Answers that choose: a lettered option, yes or no, or refusing a question that cannot be answered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from geochat.eval.labels import bare
from geochat.eval.verdicts import Question, Summary, Verdict, share, summarise_accuracy

_OPTION = re.compile(r"(?:^|\s)\(?([A-H])[.):]\s*(.*?)(?=\s\(?[A-H][.):]\s|\n|$)")
_AT_THE_START = re.compile(r"\W*([A-H])(?:\s*[.):](?!\w\.)|\s*$|\s*\n)")
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+(?i:is))?\s*:?\s*\(?(A(?=\s*(?:$|[.),:;]))|[B-H]\b(?!'))"
)

_REFUSALS = re.compile(
    r"\b(?:invisible|not visible|not present|not shown|sorry|unable|cannot|can ?not|can't|could not|couldn't"
    r"|impossible|panchromatic|there (?:is|are) (?:no|not)|does not|doesn't|do not|don't)\b"
)


def options_of(text: str) -> dict[str, str]:
    """The lettered options that a question lists: "A. left B. right" → {"A": "left", "B": "right"}."""
    return dict(_OPTION.findall(text))


def parse_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The one option that an answer chooses: "B", "B. left", "(B)", "The answer is B.", or the option's own text.

    None when none is chosen, or several are. Only capitals count, and a letter inside a sentence does not: the "A" of
    "A ship" or of "Answer: C" is no choice.
    """
    text = answer.strip()
    if first := _AT_THE_START.match(text):
        return first[1]
    stated = set(_STATED.findall(text))
    if len(stated) == 1:
        return stated.pop()
    named = [letter for letter, option in options.items() if bare(option) and bare(option) == bare(text)]
    return named[0] if len(named) == 1 and not stated else None


def _true_letter(truth: Any, options: Mapping[str, str]) -> str:
    if (letter := parse_letter(str(truth), options)) is None:
        raise ValueError(f"the truth {truth!r:.80} names no option A, B, …")
    return letter


def _options(row: Mapping[str, Any]) -> Mapping[str, str]:
    """From a column `options`, else from the words of the question."""
    listed = row.get("options")
    return listed if isinstance(listed, dict) else options_of(str(row.get("prompt") or row.get("text") or ""))


def judge_option(answer: str, question: Question) -> Verdict:
    options = _options(question.row)
    letter = parse_letter(answer, options)
    return {
        "parsed": letter is not None,
        "correct": letter == _true_letter(question.truth, options),
        "chosen": letter,
    }


def judge_circular(answer: str, question: Question) -> Verdict:
    """One turn of a question that is asked with its options in every order; `circle` names the question."""
    options, circle = question.row.get("options"), question.row.get("circle")
    if not isinstance(options, dict) or circle is None:
        raise ValueError("circular scoring needs the columns `options` and `circle`; give the question file")
    return judge_option(answer, question) | {"circle": circle, "turns": len(options)}


def judge_xtuner(answer: str, question: Question) -> Verdict:
    """As XTuner's mmbench does: the first run of the letters A to D must be the truth, even the "A" of "Answer: C"."""
    found = re.search("[A-D]+", answer)
    chosen = found[0] if found else None
    verdict = judge_circular(answer, question)
    return verdict | {"parsed": chosen is not None, "correct": chosen == question.truth, "chosen": chosen}


def judge_llava_option(answer: str, question: Question) -> Verdict:
    """As LLaVA's ScienceQA scorer reads: the letter alone, "B. …", or the one letter after "The answer is"."""
    stated = re.findall(r"The answer is ([A-Z])\.", answer)
    if answer in tuple("ABCDE") or re.match(r"[A-E]\. ", answer):
        stated = [answer[0]]
    chosen = stated[0] if len(stated) == 1 else None
    truth = _true_letter(question.truth, _options(question.row))
    return {"parsed": chosen is not None, "correct": chosen == truth, "chosen": chosen}


def summarise_circular(verdicts: Sequence[Verdict]) -> Summary:
    """A question is right when all its turns are. `incomplete` questions lack some that others of the file have: they are
    judged by those there are. `accuracy` is that of single turns."""
    circles: dict[Any, list[Verdict]] = {}
    for v in verdicts:
        circles.setdefault(v["circle"], []).append(v)
    in_turns = any(len(turns) > 1 for turns in circles.values())
    right = sum(all(v["correct"] for v in turns) for turns in circles.values())
    return summarise_accuracy(verdicts) | {
        "questions": len(circles),
        "circular_accuracy": share(right, len(circles)),
        "incomplete": sum(in_turns and len(turns) != turns[0]["turns"] for turns in circles.values()),
    }


def parse_yes_no(answer: str) -> str | None:
    """ "no" when the first sentence has the word no, not or false, else "yes" when it has yes or true (POPE's order)."""
    words = set(re.findall(r"[a-z]+", answer.split(".")[0].lower()))
    if words & {"no", "not", "false"}:
        return "no"
    return "yes" if words & {"yes", "true"} else None


def judge_yes_no(answer: str, question: Question) -> Verdict:
    truth, said = parse_yes_no(str(question.truth)), parse_yes_no(answer)
    if truth is None:
        raise ValueError(f"the truth {question.truth!r:.40} is neither yes nor no")
    return {"parsed": said is not None, "correct": said == truth, "said": said, "true": truth}


def judge_llava_yes_no(answer: str, question: Question) -> Verdict:
    """As LLaVA's POPE scorer reads: "no" when the first sentence has the word No, no or not between spaces, else "yes",
    whatever it says."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    said = "no" if {"No", "no", "not"} & {*words} else "yes"
    verdict = judge_yes_no(answer, question)
    return verdict | {"correct": said == verdict["true"], "said": said}


def summarise_yes_no(verdicts: Sequence[Verdict]) -> Summary:
    """POPE's figures with "yes" as the positive class. An answer that is neither counts as a miss for its truth."""
    yes = [v for v in verdicts if v["true"] == "yes"]
    said = [v for v in verdicts if v["said"] == "yes"]
    hit = sum(v["correct"] for v in yes)
    return summarise_accuracy(verdicts) | {
        "precision": share(hit, len(said)),
        "recall": share(hit, len(yes)),
        "f1": share(2 * hit, len(said) + len(yes)),
        "yes_share": share(len(said), len(verdicts)),
    }


def refuses(text: str) -> bool:
    """Whether a text says that the question cannot be answered from the picture."""
    return bool(_REFUSALS.search(text.lower().replace("’", "'")))


def judge_refusal(answer: str, question: Question) -> Verdict:
    """Right when answer and truth both refuse, or both do not. A phrase list, not a reader: see the samples."""
    said = answer.strip() != ""
    return {"parsed": said, "correct": said and refuses(answer) == refuses(str(question.truth))}
