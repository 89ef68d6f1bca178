"""Ids and labels, against the outputs of the original programs and against transformers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geochat.data.encode import IGNORE_INDEX, EncodeError, Encoder
from geochat.data.sample import IMAGE_TOKEN, Sample, Turn, user_turn
from geochat.data.templates import Template, get_template
from geochat.data.words import WordTable, by_words

IMAGE = -200


class Pieces:
    """sentencepiece as a function that can be pickled."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.model = pytest.importorskip("sentencepiece").SentencePieceProcessor(str(file))

    def __call__(self, text: str) -> list[int]:
        return self.model.encode(text)

    def names(self) -> list[str]:
        return [self.model.id_to_piece(i) for i in range(len(self.model))]

    def __reduce__(self):
        return Pieces, (self.file,)


@pytest.fixture(scope="session")
def golden(assets: Path) -> Path:
    return assets / "golden"


@pytest.fixture(scope="session")
def golden_pieces(golden: Path) -> Pieces:
    return Pieces(golden / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def pieces(tiny_tokenizer_model: Path) -> Pieces:
    return Pieces(tiny_tokenizer_model)


def encoder(encode_text, template: str = "vicuna_v1", **changes) -> Encoder:
    settings = {
        "bos_id": 1,
        "special_ids": {"<unk>": 0, "<s>": 1, "</s>": 2},
        "image_token_id": IMAGE,
        "image_tokens": 1,
    }
    return Encoder(encode_text, get_template(template), **{**settings, **changes})


def sample(*texts: str, images: int = 1) -> Sample:
    turns = [
        user_turn(text, images if k == 0 else 0) if k % 2 == 0 else Turn("assistant", text)
        for k, text in enumerate(texts)
    ]
    return Sample("x", ("x.png",) * images, tuple(turns))


@pytest.mark.parametrize("expected", ["geochat/conversations", "llava/tokens", "vhm/tokens"])
@pytest.mark.parametrize("word_by_word", [False, True])
def test_ids_and_labels_are_those_of_the_original_programs(
    golden: Path, golden_pieces: Pieces, expected: str, word_by_word: bool
):
    records = {
        row["id"]: row for row in json.loads((golden / "conversations.json").read_text(encoding="utf-8"))
    }
    rows = json.loads((golden / "expected" / f"{expected}.json").read_text(encoding="utf-8"))
    encode = encoder(by_words(golden_pieces, golden_pieces.names()) if word_by_word else golden_pieces).encode
    assert rows
    for row in rows:
        encoded = encode(Sample.from_record(records[row["id"]]))
        assert encoded.input_ids.tolist() == row["input_ids"]
        assert encoded.labels.tolist() == row["labels"]
        assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32


def test_a_prompt_is_the_beginning_of_the_conversation(golden: Path, golden_pieces: Pieces):
    ours = encoder(golden_pieces)
    for row in json.loads((golden / "expected/geochat/conversations.json").read_text(encoding="utf-8")):
        turns = Sample.from_record(row).turns
        prompt = ours.encode_prompt(turns[:-1]).tolist()
        assert row["input_ids"][: len(prompt)] == prompt
        # What follows is the last answer, all of it supervised.
        assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]


def test_images_are_expanded(pieces: Pieces):
    one, many = encoder(pieces), encoder(pieces, image_tokens=9)
    short, long = one.encode(sample("a", "b", images=2)), many.encode(sample("a", "b", images=2))
    assert (long.input_ids == IMAGE).sum() == 18
    assert len(long.input_ids) == len(short.input_ids) + 16
    assert (long.labels[long.input_ids == IMAGE] == IGNORE_INDEX).all()
    assert (
        long.input_ids[long.input_ids != IMAGE].tolist() == short.input_ids[short.input_ids != IMAGE].tolist()
    )
    assert (
        long.labels[long.labels != IGNORE_INDEX].tolist()
        == short.labels[short.labels != IGNORE_INDEX].tolist()
    )
    assert (many.encode_prompt([user_turn("a", 1)]) == IMAGE).sum() == 9


def test_several_turns_are_all_supervised(pieces: Pieces):
    encoded = encoder(pieces).encode(sample("one", "first", "two", "second", "three", "third"))
    runs = np.flatnonzero(np.diff(np.concatenate([[0], encoded.labels != IGNORE_INDEX, [0]]))).reshape(-1, 2)
    answers = [
        pieces.model.decode([int(i) for i in encoded.labels[start:end] if i != 2]) for start, end in runs
    ]
    assert answers == ["first", "second", "third"]


def test_an_answer_that_quotes_the_prompt_is_no_trap(pieces: Pieces):
    # The original algorithm cuts at " ASSISTANT: " and masks such a sample completely.
    encoded = encoder(pieces).encode(sample("q", "say ASSISTANT: and USER: twice"))
    labelled = encoded.labels[encoded.labels != IGNORE_INDEX].tolist()
    assert labelled == [*pieces("say ASSISTANT: and USER: twice"), 2]


@pytest.mark.parametrize("answers", [("",), ("  \n",), ("", " ")])
def test_nothing_to_supervise_is_an_error(pieces: Pieces, answers: tuple[str, ...]):
    texts = [text for answer in answers for text in ("question", answer)]
    with pytest.raises(EncodeError, match=r"^train\.json:row 4: no supervised token"):
        encoder(pieces).encode(sample(*texts), "train.json:row 4")


def test_an_empty_answer_among_others_is_not_supervised(pieces: Pieces):
    encoded = encoder(pieces).encode(sample("q", "", "q", "yes"))
    assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == [*pieces("yes"), 2]


def test_too_long_text_is_an_error_or_cut(pieces: Pieces):
    long = sample("short question", "word " * 500)
    with pytest.raises(EncodeError, match=r"row 1: \d+ text tokens are more than 300"):
        encoder(pieces, max_text_tokens=300).encode(long, "row 1")
    cut = encoder(pieces, max_text_tokens=300, truncate=True, image_tokens=36).encode(long)
    whole = encoder(pieces, max_text_tokens=9999, image_tokens=36).encode(long)
    assert len(cut.input_ids) == 300 + 35
    assert cut.input_ids.tolist() == whole.input_ids[:335].tolist()
    assert cut.labels.tolist() == whole.labels[:335].tolist()


def test_cutting_may_leave_nothing(pieces: Pieces):
    with pytest.raises(EncodeError, match="no supervised token"):
        encoder(pieces, max_text_tokens=300, truncate=True).encode(sample("word " * 500, "yes"))
    with pytest.raises(EncodeError, match="an image stands beyond"):
        encoder(pieces, max_text_tokens=10, truncate=True).encode(sample("q", "a"))


def test_a_template_without_marks_cannot_train(pieces: Pieces):
    foreign = encoder(pieces)
    foreign.template = Template.from_jinja("{{ messages[0]['content'] }}", "foreign")
    with pytest.raises(ValueError, match=r"'foreign' has no .* generation"):
        foreign.encode(sample("q", "a"))
    assert len(foreign.encode_prompt([user_turn("q", 0)])) > 0


def test_special_tokens_become_their_ids(pieces: Pieces):
    special = {"</s>": 2, "<|im_start|>": 600, "<|im_end|>": 601, "<|im_end|>x": 602}
    ids = (
        encoder(pieces, "chatml", special_ids=special, bos_id=None)
        .encode(sample("q", "a"))
        .input_ids.tolist()
    )
    assert ids[0] == 600
    assert ids.count(601) == 3
    assert 602 not in ids


def test_an_encoder_can_be_pickled(pieces: Pieces):
    ours = encoder(by_words(pieces, pieces.names()))
    copy = pickle.loads(pickle.dumps(ours))
    assert (
        copy.encode(sample("q", "a b c")).input_ids.tolist()
        == ours.encode(sample("q", "a b c")).input_ids.tolist()
    )


def test_one_encoder_gives_the_same_twice(pieces: Pieces):
    ours = encoder(pieces)
    first = ours.encode(sample("q", "a", "q", "a"))
    again = ours.encode(sample("q", "a", "q", "a"))
    assert first.input_ids.tolist() == again.input_ids.tolist()
    assert first.labels.tolist() == again.labels.tolist()


SPELLINGS = ["a", "ship", " ", "  ", "\n", "▁", "{<1><2>", "é", "船", "\t", "ASSISTANT:", "."]
words = st.lists(st.sampled_from(SPELLINGS), max_size=12).map("".join)


@given(text=words)
@settings(max_examples=150)
def test_word_by_word_is_the_same(pieces: Pieces, text: str):
    table = by_words(pieces, pieces.names())
    assert isinstance(table, WordTable)
    assert table(text) == pieces(text)


def test_a_tokenizer_whose_words_depend_on_each_other_is_left_alone(pieces: Pieces):
    assert by_words(pieces, ["▁a", "b▁c"]) is pieces

    def characters(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    assert by_words(characters, ["a"]) is characters


def test_without_a_leading_space_of_its_own_texts_stay_as_they_are():
    ours = encoder(lambda text: [ord(letter) for letter in text], special_ids={"</s>": 2})
    encoded = ours.encode(sample("q", "a"))
    rendered = get_template("vicuna_v1").render(sample("q", "a").turns)
    before, _, after = rendered.removesuffix("</s>").partition(IMAGE_TOKEN)
    assert encoded.input_ids.tolist() == [1, *map(ord, before), IMAGE, *map(ord, after), 2]
    assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == [ord(" "), ord("a"), 2]


dialogues = st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=3)


@given(pairs=dialogues)
@settings(max_examples=60, deadline=None)
def test_labels_are_the_ids_or_ignored(pieces: Pieces, pairs: list[tuple[str, str]]):
    encoded = encoder(pieces, max_text_tokens=99999).encode(
        sample(*[text for pair in pairs for text in pair])
    )
    assert ((encoded.labels == encoded.input_ids) | (encoded.labels == IGNORE_INDEX)).all()
    # One end of sequence per answer, and every one of them supervised.
    assert (encoded.labels == 2).sum() == (encoded.input_ids == 2).sum() == len(pairs)
