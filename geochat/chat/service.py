"""One model, many users: a thread of its own asks the model, everyone waits for a ticket.

Requests join the running batch between two tokens, one at a time, so that nobody who is being answered waits for long.
Where more wait than fit, each user's first request comes before anyone's second.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Hashable, Iterator

from geochat.chat.engine import Chat
from geochat.chat.request import Request
from geochat.chat.rows import Row
from geochat.chat.sampling import Settings
from geochat.chat.text import Answer, Pieces


class Ticket:
    """A request on its way. Iterate over it for the pieces of the answer; together they are `answer.text`."""

    def __init__(self, service: Service, row: Row, user: Hashable) -> None:
        self.answer: Answer | None = None
        """Set when it has ended; of a cancelled request what there is of it; None after an error."""
        self.user, self.row = user, row
        self.cancelled = False
        self._service = service
        self._pieces = Pieces(service.chat.processor.tokenizer)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[str]:
        """Pieces as they come, once. Raises what ended the request, if it was not its last word."""
        while (piece := self._queue.get()) is not None:
            yield piece
        if self.row.error is not None:
            raise self.row.error

    @property
    def position(self) -> int:
        """0: being answered, or ended; n: the n-th of those who wait."""
        return self._service.position(self)

    def cancel(self) -> None:
        """End it; its place is free at the next token."""
        self._service.cancel(self)

    def grow(self) -> None:
        """Hand over what the row has got."""
        if self.row.ids and (piece := self._pieces.grow(self.row.ids)):
            self._queue.put(piece)

    def end(self) -> None:
        """Hand over the rest and the answer."""
        if self.row.error is None:
            if piece := self._pieces.end(self.row.ids):
                self._queue.put(piece)
            self.answer = self._service.chat.finish(self.row)
        self._queue.put(None)


class Service:
    """Answers the requests of many users in one batch. An error in one of them ends that one alone."""

    def __init__(
        self, chat: Chat, *, max_waiting: int = 64, batch_size: int = 16, token_budget: int | None = None
    ) -> None:
        """
        Args:
            max_waiting: requests that may wait; more are refused.
            batch_size: requests that are answered at a time.
            token_budget: bound on their tokens; default: what half of the free memory holds.
        """
        self.chat = chat
        self._max_waiting, self._batch_size = max_waiting, batch_size
        self._token_budget = token_budget or chat.token_budget()
        self._batch = chat.batch()
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        *,
        user: Hashable = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Ticket:
        """Ask. Without `user` the request is a user of its own.

        Raises ValueError when it cannot be asked, when too many wait, and when the service is closed.
        """
        settings = Settings(max_new_tokens, temperature, top_p, seed)
        ticket = Ticket(self, self.chat.row(request, settings, keep=True), object() if user is None else user)
        with self._changed:
            if self._closing:
                raise ValueError("the service is closed")
            if len(self._waiting) >= self._max_waiting:
                raise ValueError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def position(self, ticket: Ticket) -> int:
        with self._changed:
            return self._queue().index(ticket) + 1 if ticket in self._waiting else 0

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                ticket.end()

    def close(self) -> None:
        """End what waits and what runs, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _queue(self) -> list[Ticket]:
        """Those who wait, in the order in which they will be taken: by how many requests of their user come before."""
        before = Counter(ticket.user for ticket in self._running)
        rounds = []
        for ticket in self._waiting:
            rounds.append(before[ticket.user])
            before[ticket.user] += 1
        return [self._waiting[i] for i in sorted(range(len(rounds)), key=lambda i: rounds[i])]

    # -- in the service's own thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._wait():
            self._drop_cancelled()
            if (ticket := self._take()) is not None:
                self._admit(ticket)
            self._step()
            for ticket in self._running:
                ticket.grow()
        for ticket in (*self._running, *self._waiting):
            ticket.row.error = ValueError("the service was closed")
            ticket.end()

    def _wait(self) -> bool:
        """Until there is something to do; False when the service is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._running)
            return not self._closing

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._running if ticket.cancelled]:
            self._batch.drop(ticket.row)
            self._end(ticket)

    def _take(self) -> Ticket | None:
        """The next ticket, if there is room for it."""
        with self._changed:
            order = self._queue()
            rows = [ticket.row for ticket in order]
            self._batch.read_ahead(rows)
            if not self._batch.fitting(rows[:1], self._batch_size, self._token_budget):
                return None
            self._waiting.remove(order[0])
            self._running.append(order[0])
            return order[0]

    def _admit(self, ticket: Ticket) -> None:
        try:
            ended = self._batch.admit([ticket.row])
        except Exception as error:  # whatever it is, it is this request's
            self._fail(ticket, error)
        else:
            self._end_rows(ended)

    def _step(self) -> None:
        try:
            self._end_rows(self._batch.step())
        except Exception as error:  # memory, mostly: the others may go on without the last to come
            self._fail(self._running[-1], error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.row.error = error
        if ticket.row in self._batch.rows:
            self._batch.drop(ticket.row)
        self._end(ticket)

    def _end_rows(self, rows: list[Row]) -> None:
        for ticket in [ticket for ticket in self._running if ticket.row in rows]:
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        with self._changed:
            self._running.remove(ticket)
        ticket.end()
