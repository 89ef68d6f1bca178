"""Caption scores against values worked out by hand from the published formulas."""

from __future__ import annotations

import pytest

from geochat.eval import captions
from geochat.eval.captions import caption_scores, judge_caption, judge_description, plain
from geochat.eval.metrics import METRICS
from geochat.eval.verdicts import Question


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures whether or not this machine has WordNet."""
    caption_scores.cache_clear()
    monkeypatch.setattr(captions, "wordnet", lambda: None)


def test_tags_boxes_and_full_stops_do_not_count() -> None:
    assert plain("<p>1 Gray ship</p> {<1><2><3><4>|<5>}  at the right.") == "1 gray ship at the right"
    assert judge_caption("<p>1 Gray Ship</p>", Question("1 gray ship."))["rouge1"] == 1


def test_rouge_by_hand() -> None:
    scores = caption_scores("white ship small", "small white ship")
    assert scores["rouge1"] == 1.0
    assert scores["rougeL"] == pytest.approx(2 / 3)  # "white ship" is the longest common subsequence
    assert caption_scores("ships", "ship")["rouge1"] == 1.0  # stemmed


def test_meteor_by_hand() -> None:
    # Three of three words match in two chunks: penalty 0.5 · (2/3)³, F mean 1.
    assert caption_scores("white ship small", "small white ship")["meteor"] == pytest.approx(
        1 - 0.5 * (2 / 3) ** 3
    )
    # "ships" meets "ship" at the stem stage; P = 1/2, R = 1, F = P·R / (0.9·P + 0.1·R), one chunk of one match.
    expected = (0.5 / (0.9 * 0.5 + 0.1 * 1)) * (1 - 0.5)
    assert caption_scores("big ships", "ship")["meteor"] == pytest.approx(expected)
    assert caption_scores("vessel", "ship")["meteor"] == 0  # synonyms need WordNet


def test_the_variant_of_meteor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert captions.meteor_variant() == "exact and stem matches; WordNet is not there"
    monkeypatch.setattr(captions, "wordnet", lambda: object())
    assert captions.meteor_variant() == "exact, stem and synonym matches"


def test_an_empty_caption_counts_as_nothing() -> None:
    verdicts = [judge_caption(answer, Question("1 ship")) for answer in ("1 ship", "")]
    summary = METRICS["caption"].summarise(verdicts)
    assert (summary["n"], summary["failed"]) == (2, 1)
    assert summary["rougeL"] == 0.5
    with pytest.raises(ValueError, match="holds no word"):
        judge_caption("a", Question("."))


def test_descriptions_with_and_without_true_boxes() -> None:
    truth, answer = "two ships", "<p>two ships</p> {<10><10><20><20>|<90>}"
    without = judge_description(answer, Question(truth))
    assert without["rougeL"] == 1
    assert "boxes" not in without
    polygon = [[10, 10], [20, 10], [20, 20], [10, 20]]
    boxed = judge_description(answer, Question(truth, (100, 100), row={"boxes": [polygon]}))
    summary = METRICS["description"].summarise([without, boxed])
    assert (summary["n"], summary["boxes_n"], summary["boxes_recall@0.25"]) == (2, 1, 1.0)
    assert "boxes_n" not in METRICS["description"].summarise([without])
