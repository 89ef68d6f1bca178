"""Tokenising word by word, for tokenizers whose tokens never reach across a space.

Text repeats its words far more often than its sentences, so nearly every word is a dictionary look-up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain

SPACE = "▁"
"""How sentencepiece writes a space inside its pieces."""

_KEPT_WORDS = 1 << 16  # about 15 MB; emptied when full
# A word owns the spaces before it; spaces at the end of a text stand alone.
_WORD = re.compile(r" *[^ ]+| +$")


def by_words(encode_text: Callable[[str], list[int]], pieces: Iterable[str]) -> Callable[[str], list[int]]:
    """`encode_text` through a `WordTable` if that gives the same ids, else as it is.

    It does for a sentencepiece tokenizer that puts a space before every text and has no piece with a space behind
    another character: then no merge crosses into the next word, and a word alone has the ids it has after a space.
    """
    if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
        return encode_text
    table = WordTable(encode_text)
    probes = ("a b", "a  b", " a", "a ", "a   ", "   ", "\na b\n\n c", "1 2, {<3><-4>|<90>} .")
    return table if all(table(probe) == list(encode_text(probe)) for probe in probes) else encode_text


class WordTable:
    """Ids of a text out of the remembered ids of its words; see `by_words` for when that is right.

    Picklable, without what it remembers.
    """

    def __init__(self, encode_text: Callable[[str], list[int]]) -> None:
        self._encode_text = encode_text
        self._known = _Known(encode_text)

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`, equal to those of the tokenizer itself."""
        if not text or SPACE in text:  # written out, the mark would join the spaces around it
            return list(self._encode_text(text))
        if "  " in text or text[0] == " " or text[-1] == " ":
            # The tokenizer brings one space of its own: the first word keeps those written, later ones give up one.
            words = [word if k == 0 else word[1:] for k, word in enumerate(_WORD.findall(text))]
        else:
            words = text.split(" ")
        return list(chain.from_iterable(map(self._known.__getitem__, words)))

    def __reduce__(self) -> tuple[type[WordTable], tuple[Callable[[str], list[int]]]]:
        return type(self), (self._encode_text,)


class _Known(dict[str, list[int]]):
    """word → ids; a word that is not there yet is asked for."""

    def __init__(self, encode_text: Callable[[str], list[int]]) -> None:
        self._encode_text = encode_text

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= _KEPT_WORDS:
            self.clear()
        # The tokenizer adds its space to no empty text, so one space is what "a " has more than "a".
        ids = list(self._encode_text(word or "a "))
        if not word:
            ids = ids[len(self._encode_text("a")) :]
        if len(word) <= 64:
            self[word] = ids
        return ids
