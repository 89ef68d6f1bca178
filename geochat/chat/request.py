"""What is asked, and how many questions go into one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from geochat.data.sample import Turn, user_turn

Picture = Image.Image | str | Path


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a question, and the images it is about, in the order of their marks."""

    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]

    @classmethod
    def ask(cls, text: str, *images: Picture) -> Request:
        """One question about the images (none for a question without a picture)."""
        return cls(images, (user_turn(text, len(images)),))

    def follow(self, answer: str, question: str) -> Request:
        """The conversation after the model's answer and the user's next question."""
        return Request(self.images, (*self.turns, Turn("assistant", answer), Turn("user", question)))


@dataclass(frozen=True)
class Prompt:
    index: int
    ids: np.ndarray  # int32 [tokens], image placeholders expanded
    images: tuple[str, ...]  # keys of the feature cache
    budget: int  # new tokens that still fit into the model's context


def picture_key(picture: Picture) -> str:
    """Equal for equal pictures: a file by its path, time and size, a picture in memory by its pixels."""
    if isinstance(picture, Image.Image):
        seen = picture.convert("RGB")  # a palette's indices alone would not tell its colours
        return hashlib.sha256(repr(seen.size).encode() + seen.tobytes()).hexdigest()
    try:
        status = Path(picture).stat()
    except OSError as error:
        raise ValueError(f"{picture}: cannot be read ({error.strerror})") from None
    return f"{Path(picture).absolute()}\0{status.st_mtime_ns}\0{status.st_size}"


def batches(
    prompts: Sequence[Prompt], batch_size: int, token_budget: int, new_tokens: int
) -> Iterator[list[Prompt]]:
    """Neighbours together, as long as count and padded tokens stay within the bounds."""
    batch: list[Prompt] = []
    width = 0
    for prompt in prompts:
        grown = max(width, len(prompt.ids) + new_tokens)
        if batch and (len(batch) == batch_size or grown * (len(batch) + 1) > token_budget):
            yield batch
            batch, grown = [], len(prompt.ids) + new_tokens
        batch.append(prompt)
        width = grown
    if batch:
        yield batch
