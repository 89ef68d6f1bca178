"""From the scores of the next token to the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Settings:
    """How requests are answered. Raises ValueError for what is out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token; else drawn."""
    top_p: float = 1.0
    """Share of probability that is drawn from."""
    seed: int | None = None
    """Of the first request; the i-th has `seed` + i. None: from torch's own generator."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature} must not be negative, top_p {self.top_p} lies in (0, 1]"
            )

    def sampler(self, index: int = 0) -> Sampler | None:
        """Draws the tokens of the request of this index; None where nothing is drawn."""
        if not self.temperature:
            return None
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed + index
        return Sampler(self.temperature, self.top_p, seed)


class Sampler:
    """Draws one request's tokens, whatever else is drawn beside it."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, scores: torch.Tensor) -> int:
        """A token, by its scores float32 [word]."""
        chances = torch.softmax(self._warpers(None, scores[None])[0], dim=-1)
        return int(torch.multinomial(chances.cpu(), 1, generator=self._generator))


def choose(scores: torch.Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """A token for each row of scores float32 [row, word]; None where the scores are not numbers."""
    tokens: list[int | None] = scores.argmax(dim=-1).tolist()
    broken = (~scores.amax(dim=-1).isfinite()).tolist()
    for row, sampler in enumerate(samplers):
        if broken[row]:
            tokens[row] = None
        elif sampler:
            tokens[row] = sampler.draw(scores[row])
    return tokens
