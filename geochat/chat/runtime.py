"""What generation needs from its surroundings: a device, a dtype, a way to hand over tokens and to stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


def pick_device(name: str = "auto") -> str:
    """ "auto": CUDA, else Apple's MPS, else the CPU. ValueError when a named device is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    missing = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    if missing or kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not available here; use auto, cpu, cuda, cuda:N or mps")
    return name


def default_dtype(device: str) -> torch.dtype:
    """float32 on the CPU, bfloat16 on a GPU that has it, else float16."""
    if device == "cpu":
        return torch.float32
    wide = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wide else torch.float16


class TokenQueue(BaseStreamer):
    """Tokens from the generating thread to the reading one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._queue.put(int(value.reshape(-1)[0]))
        self._prompt_seen = True

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self._queue.get()) is not None:
            yield token


class Stopped(StoppingCriteria):
    """Ends generation once another thread asks for it."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class Finite(LogitsProcessor):
    """A model whose numbers have overflown says so; its answers would be noise."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isnan(scores).any():
            raise RuntimeError(
                f"the model's scores are not numbers ({scores.dtype}); load it in a wider dtype"
            )
        return scores
