"""Keys and values of prompts that were computed before: the next question on the same picture begins where they end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(eq=False)
class Prefix:
    """The computed beginning of a prompt."""

    signature: np.ndarray  # int64 [token], see `Prompt`
    layers: list[
        tuple[torch.Tensor, torch.Tensor]
    ]  # keys and values [key-value head, token, width] of every layer

    def __len__(self) -> int:
        return len(self.signature)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


def shared_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two signatures have in common from the start, if it is at least half of `one`; else 0.

    Less (a system sentence, mostly) is sooner computed again than looked at apart from the rest of the prompt. The last
    token of `one` never counts: what follows the prompt is computed from it.
    """
    length = min(len(one) - 1, len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    shared = int(different[0]) if len(different) else length
    return shared if 2 * shared >= len(one) else 0


def longest(signature: np.ndarray, prefixes: Iterable[Prefix]) -> tuple[Prefix, int] | None:
    """The prefix that has the most tokens in common with a prompt, and their number; None where none has enough."""
    found = max(
        ((prefix, shared_tokens(signature, prefix.signature)) for prefix in prefixes),
        key=lambda pair: pair[1],
        default=None,
    )
    return found if found and found[1] else None


class Prefixes:
    """Prefixes kept between questions: the latest used, as many as fit into `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: list[Prefix] = []  # the latest used stands last

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self.kept)

    def keep(self, prefix: Prefix) -> None:
        """Add one. Those that it begins with are dropped: it serves whatever they served."""
        length = len(prefix)
        self.kept = [
            old
            for old in self.kept
            if len(old) > length or not np.array_equal(old.signature, prefix.signature[: len(old)])
        ]
        self.kept.append(prefix)
        size = self.nbytes
        while size > self.limit:
            size -= self.kept.pop(0).nbytes

    def use(self, prefix: Prefix) -> None:
        """Note that a prompt goes on from this one."""
        if prefix in self.kept:
            self.kept.remove(prefix)
            self.kept.append(prefix)
