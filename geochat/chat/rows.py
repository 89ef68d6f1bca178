"""Questions on their way through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from geochat.chat.prefixes import Prefix
from geochat.chat.request import Prompt
from geochat.chat.sampling import Sampler


@dataclass(eq=False)
class Row:
    """One question on its way."""

    prompt: Prompt
    budget: int
    """New tokens that the answer may have."""
    sampler: Sampler | None = None
    index: int = 0
    """The caller's own number."""
    keep: bool = False
    """Keep the whole conversation's keys and values for its next turn."""
    ids: list[int] = field(default_factory=list)
    """New tokens, without the stop token."""
    finished: bool = False
    """It came to a stop token."""
    error: Exception | None = None
    prefix: Prefix = field(init=False)
    shared: int = 0
    length: int = 0

    @property
    def ended(self) -> bool:
        return self.finished or self.error is not None or len(self.ids) >= self.budget


def passes(rows: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """Neighbours whose uncomputed tokens, padded, are `most` at the most; or one row that has more."""
    part: list[Row] = []
    width = 0
    for row in rows:
        length = len(row.prompt.ids) - row.shared
        if part and max(width, length) * (len(part) + 1) > most:
            yield part
            part, width = [], 0
        part.append(row)
        width = max(width, length)
    if part:
        yield part
