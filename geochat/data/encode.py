"""Conversation → token ids and labels, segment by segment.

The rendered conversation is cut at special tokens, at images and where supervision begins or ends; every piece is
tokenised by itself. So what is supervised is known before there are tokens, and cannot be lost by counting them.
With a sentencepiece tokenizer of the Llama kind the ids are those of LLaVA and GeoChat (`legacy=true`): a piece after
a special token begins with the same leading space as a text does.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from geochat.data.sample import IMAGE_TOKEN, Sample, Turn
from geochat.data.templates import Template

IGNORE_INDEX = -100
"""Label of a token that is not supervised; torch's cross entropy skips it."""

# System sentences, class lists and short answers repeat; longer pieces hardly do. At most some 40 MB together.
_CACHED_PIECES = 4096
_CACHED_CHARACTERS = 1024


class EncodeError(ValueError):
    """A conversation that cannot be trained on: nothing supervised, or too long."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens; images are already expanded to their placeholders."""

    input_ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n], IGNORE_INDEX where not supervised


class Encoder:
    """Turns conversations into ids and labels with one tokenizer and one template."""

    def __init__(
        self,
        encode_text: Callable[[str], list[int]],
        template: Template,
        *,
        bos_id: int | None,
        special_ids: Mapping[str, int],
        image_token_id: int,
        image_tokens: int,
        max_text_tokens: int = 2048,
        truncate: bool = False,
    ) -> None:
        """
        Args:
            encode_text: ids of a text, with no special tokens added and none looked for.
            bos_id: id before the first token, or None where the tokenizer has none.
            special_ids: special tokens that the template or a text may hold (`</s>`, `<|im_end|>`), with their ids.
            image_token_id: id of the image placeholder.
            image_tokens: placeholders per image.
            max_text_tokens: bound on a conversation's length; an image counts as one token, as in LLaVA.
            truncate: cut a conversation that is too long instead of raising.
        """
        self.template = template
        self.bos_id = bos_id
        self.special_ids = {text: i for text, i in special_ids.items() if text and text != IMAGE_TOKEN}
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self.max_text_tokens = max_text_tokens
        self.truncate = truncate
        self._encode_text = encode_text
        # Longest first, so that no special token hides another that it begins with.
        names = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        # A tokenizer that puts a space before every text gives other ids for "a" alone than for "a" after a newline.
        alone, after = list(encode_text("a")), list(encode_text("\na"))
        self._dummy_prefix = after[-len(alone) :] != alone
        self._cached_piece = lru_cache(maxsize=_CACHED_PIECES)(self._encode_piece)

    def encode(self, sample: Sample, where: str = "") -> Encoded:
        """Ids and labels of a whole conversation.

        Args:
            where: put before an error's text, such as "train.json:row 17".

        Raises:
            EncodeError: nothing supervised, an image cut away, or more than `max_text_tokens` without `truncate`.
            ValueError: the template fails on these turns or does not say what is supervised.
        """
        prefix = f"{where}: " if where else ""
        if not self.template.supervises():
            raise ValueError(
                f"chat template {self.template.name!r} has no {{% generation %}} block; training needs it"
            )
        ids, spans = self._walk(sample.turns, False)
        if len(ids) > self.max_text_tokens:
            if not self.truncate:
                raise EncodeError(
                    f"{prefix}{len(ids)} text tokens are more than {self.max_text_tokens}; "
                    "raise --model_max_length or shorten the conversation"
                )
            if self.image_token_id in ids[self.max_text_tokens :]:
                raise EncodeError(
                    f"{prefix}an image stands beyond the first {self.max_text_tokens} text tokens"
                )
            del ids[self.max_text_tokens :]
        input_ids = np.array(array("i", ids))
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for start, end in spans:
            labels[start:end] = input_ids[start:end]
        if not spans or spans[0][0] >= len(ids):
            raise EncodeError(f"{prefix}no supervised token: every answer is empty or cut away")
        repeats = self._repeats(ids)
        if repeats is None:
            return Encoded(input_ids, labels)
        return Encoded(np.repeat(input_ids, repeats), np.repeat(labels, repeats))

    def encode_prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """Ids, int32 [n], of a conversation that waits for an answer; never cut."""
        ids, _ = self._walk(turns, True)
        repeats = self._repeats(ids)
        input_ids = np.array(array("i", ids))
        return input_ids if repeats is None else np.repeat(input_ids, repeats)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cached_piece"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cached_piece = lru_cache(maxsize=_CACHED_PIECES)(self._encode_piece)

    def _walk(
        self, turns: Sequence[Turn], add_generation_prompt: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids with one placeholder per image, and the supervised stretches as (start, end)."""
        ids: list[int] = [] if self.bos_id is None else [self.bos_id]
        spans: list[tuple[int, int]] = []
        after_text = False
        for text, supervised in self.template.segments(turns, add_generation_prompt):
            if text == IMAGE_TOKEN:
                ids.append(self.image_token_id)
                after_text = False
                continue
            cached = len(text) <= _CACHED_CHARACTERS
            encode_piece = self._cached_piece if cached else self._encode_piece
            piece, after_text, blank = encode_piece(text, after_text)
            # An empty answer would teach to say nothing: its closing token alone is not supervised.
            if supervised and not blank:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        return ids, spans

    def _encode_piece(self, text: str, after_text: bool) -> tuple[list[int], bool, bool]:
        """Ids of a segment, whether it ends in plain text, and whether it is blank but for special tokens."""
        ids: list[int] = []
        blank, start = True, 0
        for special in self._special.finditer(text) if self._special else ():
            chunk = text[start : special.start()]
            if chunk:
                blank = blank and not chunk.strip()
                ids += self._encode_chunk(chunk, after_text)
            ids.append(self.special_ids[special.group()])
            after_text, start = False, special.end()
        chunk = text[start:]
        if chunk:
            blank = blank and not chunk.strip()
            ids += self._encode_chunk(chunk, after_text)
            after_text = True
        return ids, after_text, blank

    def _encode_chunk(self, chunk: str, after_text: bool) -> list[int]:
        # Within a running text the tokenizer's own leading space is the one already written there.
        if after_text and self._dummy_prefix and chunk[0] == " ":
            chunk = chunk[1:]
        return self._encode_text(chunk) if chunk else []

    def _repeats(self, ids: list[int]) -> np.ndarray | None:
        """How often each id stands in the expanded sequence; None when every id stands once."""
        if self.image_tokens == 1 or self.image_token_id not in ids:
            return None
        return np.where(np.array(array("i", ids)) == self.image_token_id, self.image_tokens, 1)
