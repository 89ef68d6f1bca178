"""VQA accuracy as EvalAI's server computes it: normalised answers, each of ten people's answers left out in turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache

from geochat.eval.verdicts import Question, Summary, Verdict, counted, mean

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(i) for i, word in enumerate(_WORDS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""


@cache
def contractions() -> dict[str, str]:
    """Words without one of their apostrophes → the contraction."""
    table = {"somebody'd": "somebodyd"}  # as it stands in the server's table
    for word in _CONTRACTIONS.split():
        for i, letter in enumerate(word):
            if letter == "'":
                table[word[:i] + word[i + 1 :]] = word
    return table


@lru_cache(maxsize=65536)
def normalise(answer: str) -> str:
    """EvalAI's answer processor, with two slips of the original that its scores depend on: the look-behind of the rule
    for full stops never fails, so one after a digit goes too; and that rule ends after 32 removals."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    beside_space = text
    for mark in _PUNCTUATION:
        gone = f"{mark} " in beside_space or f" {mark}" in beside_space
        text = text.replace(mark, "" if gone else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions().get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, equal answers among the others ÷ 3)."""
    said, given = normalise(answer), [normalise(person) for person in people]
    equal = given.count(said)
    left_out = [min(1.0, (equal - (person == said)) / 3) for person in given]
    return sum(left_out) / len(left_out)


def judge_vqa(answer: str, question: Question) -> Verdict:
    if not isinstance(question.truth, list) or not question.truth:
        raise ValueError(f"the truth must be the list of people's answers, not {question.truth!r:.80}")
    score = vqa_accuracy(answer, [str(person) for person in question.truth])
    return {"parsed": answer.strip() != "", "vqa_accuracy": score}


def summarise_vqa(verdicts: Sequence[Verdict]) -> Summary:
    return counted(verdicts) | {"vqa_accuracy": mean([v["vqa_accuracy"] for v in verdicts])}
