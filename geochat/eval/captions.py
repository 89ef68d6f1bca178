"""Answers that are prose: ROUGE-1 and ROUGE-L (F1, stemmed) and METEOR against one reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from geochat.data.boxes import without_boxes
from geochat.eval.boxes import judge_boxes, summarise_boxes
from geochat.eval.verdicts import Question, Summary, Verdict, counted, mean


def plain(text: str) -> str:
    """Lower case, without tags, boxes and full stops, for answer and reference alike."""
    return " ".join(without_boxes(text).lower().replace(".", "").split())


class _NoSynonyms:
    """Stands for WordNet where its files are not there: the synonym stage then finds nothing."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def wordnet() -> Any:
    """NLTK's WordNet, or None where its files are not there; nothing is downloaded."""
    from nltk.corpus import wordnet as reader

    try:
        reader.ensure_loaded()
    except LookupError:
        return None
    return reader


def meteor_variant() -> str:
    return "exact, stem and synonym matches" if wordnet() else "exact and stem matches; WordNet is not there"


@cache
def _rouge() -> Callable[[str, str], Any]:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score


@lru_cache(maxsize=65536)
def caption_scores(answer: str, reference: str) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L F1 with Porter's stemmer, and METEOR (alpha 0.9, beta 3, gamma 0.5) on words between spaces."""
    from nltk.translate.meteor_score import single_meteor_score

    said, wanted = plain(answer), plain(reference)
    rouge = _rouge()(wanted, said)
    return {
        "rouge1": rouge["rouge1"].fmeasure,
        "rougeL": rouge["rougeL"].fmeasure,
        "meteor": single_meteor_score(wanted.split(), said.split(), wordnet=wordnet() or _NoSynonyms()),
    }


def judge_caption(answer: str, question: Question) -> Verdict:
    if not plain(str(question.truth)):
        raise ValueError(f"the truth {question.truth!r:.80} holds no word")
    scores = caption_scores(answer, str(question.truth))
    return {"parsed": plain(answer) != "", **scores}


def summarise_captions(verdicts: Sequence[Verdict]) -> Summary:
    """Arithmetic means over all questions; an empty answer has 0."""
    return counted(verdicts) | {
        key: mean([v[key] for v in verdicts]) for key in ("rouge1", "rougeL", "meteor")
    }


def judge_description(answer: str, question: Question) -> Verdict:
    """A description with boxes: its words, and its boxes where the row has true ones in a column `boxes`."""
    verdict = judge_caption(answer, question)
    polygons = question.row.get("boxes")
    if polygons is None:
        return verdict
    return verdict | {"boxes": judge_boxes(answer, Question(polygons, question.size, iou=question.iou))}


def summarise_descriptions(verdicts: Sequence[Verdict]) -> Summary:
    boxed = [v["boxes"] for v in verdicts if "boxes" in v]
    figures = {f"boxes_{key}": value for key, value in summarise_boxes(boxed).items()} if boxed else {}
    return summarise_captions(verdicts) | figures
