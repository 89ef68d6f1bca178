"""What is asked, and its tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from geochat.data.sample import IMAGE_TOKEN, Turn, user_turn

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

    def check(self) -> None:
        """Raises ValueError when it does not end with a question, or has other pictures than its text."""
        if not self.turns or self.turns[-1].role != "user":
            raise ValueError("the last turn must be the user's question")
        marks = sum(turn.text.count(IMAGE_TOKEN) for turn in self.turns)
        if marks != len(self.images):
            raise ValueError(f"{marks} {IMAGE_TOKEN} in the text for {len(self.images)} images")


@dataclass(frozen=True, eq=False)
class Prompt:
    ids: np.ndarray  # int32 [token], image placeholders expanded
    images: tuple[str, ...]  # keys of the pictures, see `picture_key`
    pictures: tuple[Picture, ...]
    signature: np.ndarray
    """int64 [token]: the ids, with another number for each picture's placeholders. Prompts whose signatures begin equally
    begin with the same tokens and pictures."""

    @classmethod
    def of(cls, ids: np.ndarray, pictures: tuple[Picture, ...], image_token_id: int) -> Prompt:
        """Raises ValueError when a picture's file is not there."""
        keys = tuple(picture_key(picture) for picture in pictures)
        signature = ids.astype(np.int64)
        places = np.flatnonzero(ids == image_token_id)
        for key, run in zip(keys, np.split(places, max(1, len(keys))), strict=bool(keys)):
            digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
            signature[run] = -1 - (int.from_bytes(digest[:8], "little") >> 1)
        return cls(ids, keys, pictures, signature)

    def needed(self, start: int = 0) -> list[tuple[str, Picture]]:
        """Pictures, with their keys, whose tokens stand at `start` or later."""
        placeholders = self.signature < 0
        tokens = int(placeholders.sum()) // max(1, len(self.images))
        seen = int(placeholders[:start].sum()) // max(1, tokens)
        return list(zip(self.images[seen:], self.pictures[seen:], strict=True))


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
