"""Questions answered one by one, or a few at once, through `Chat.stream`: first come, first served."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from geochat.chat.request import Request


class Streams:
    """Lets `at_once` questions at a time reach the model; the others wait for their turn."""

    def __init__(self, chat: Any, at_once: int = 1) -> None:
        self.chat = chat
        self.at_once = at_once
        self.line: list[Stream] = []
        self.moved = threading.Condition()

    def submit(self, request: Request, *, user: str = "", **options: Any) -> Stream:
        """Queue a question. `options` go to `Chat.stream`."""
        with self.moved:
            self.line.append(Stream(self, request, options))
            return self.line[-1]

    def close(self) -> None:
        """End what waits and what is being answered."""
        for stream in list(self.line):
            stream.cancel()


class Stream:
    """One question: iterate over it once for the answer, piece by piece."""

    def __init__(self, streams: Streams, request: Request, options: dict[str, Any]) -> None:
        self._streams, self._request, self._options = streams, request, options
        self._cancelled = False

    @property
    def position(self) -> int:
        """0: its turn has come; n: n-th of those that wait."""
        with self._streams.moved:
            line = self._streams.line
            return max(0, line.index(self) + 1 - self._streams.at_once) if self in line else 0

    def cancel(self) -> None:
        """Leave the line, or end the answer at its next piece."""
        self._cancelled = True
        with self._streams.moved:
            if self in self._streams.line:
                self._streams.line.remove(self)
            self._streams.moved.notify_all()

    def __iter__(self) -> Iterator[str]:
        with self._streams.moved:
            self._streams.moved.wait_for(lambda: self.position == 0)
        try:
            if not self._cancelled:
                with contextlib.closing(self._streams.chat.stream(self._request, **self._options)) as pieces:
                    for piece in pieces:
                        if self._cancelled:
                            break
                        yield piece
        finally:
            self.cancel()
