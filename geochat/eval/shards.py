"""A run spread over processes: each one's share of the questions."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from geochat.eval.answers import Item


@dataclass(frozen=True)
class Shard:
    """Share `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Argument type: I/N."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise argparse.ArgumentTypeError(f"{text!r}: must be I/N with I from 0 to N-1, as 0/8")
        return cls(int(found[1]), int(found[2]))

    def split(self, environment: Mapping[str, str] = os.environ) -> Shard:
        """The part of this process where torchrun started several: their shares together are this one."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return self
        rank, processes = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Shard(self.index * processes + rank, self.count * processes)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This shard's questions: those about one picture stay together, and no shard has more than another by over
        one picture's. The same for the same items, so that processes need not talk to each other."""
        pictures: dict[str, list[Item]] = {}
        for item in items:
            pictures.setdefault(item.group, []).append(item)
        shares: list[list[Item]] = [[] for _ in range(self.count)]
        for questions in sorted(pictures.values(), key=len, reverse=True):
            min(shares, key=len).extend(questions)
        return shares[self.index]

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"
