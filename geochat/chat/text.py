"""From tokens to words: whole answers, and answers that are still growing."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]
    """New tokens, without the stop token."""
    finished: bool
    """False when the token budget ended the answer."""


def in_order(results: Generator[tuple[int, Answer | Exception], None, None]) -> list[Answer]:
    """Answers, each given with the index of its request, by that index.

    Raises the first error, a ValueError with the index; what is not answered by then is not asked.
    """
    answers: dict[int, Answer] = {}
    with closing(results):
        for i, result in results:
            if isinstance(result, ValueError):
                raise ValueError(f"request {i}: {result}") from None
            if isinstance(result, Exception):
                raise result
            answers[i] = result
    return [answers[i] for i in sorted(answers)]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


class Pieces:
    """Text as it grows. Outer white space and half-received characters are held back: a run of byte tokens is decoded as a
    whole, so nothing of it is certain before another kind of token follows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._shown = ""

    def grow(self, ids: Sequence[int]) -> str:
        """What is new in the text of these tokens, which begin with those of the call before; often nothing."""
        byte = self._tokenizer.convert_ids_to_tokens(ids[-1]).startswith("<0x")
        text = decode(self._tokenizer, ids)
        return "" if byte or text.endswith("\ufffd") else self._show(text)

    def end(self, ids: Sequence[int]) -> str:
        """What was held back."""
        return self._show(decode(self._tokenizer, ids))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:
            self._shown = text
        return piece
