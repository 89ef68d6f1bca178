"""Many users of one model: equal answers, fair turns, errors and cancellations that stay with their request."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from geochat.chat.batch import Batch  # noqa: E402
from geochat.chat.engine import Chat, Request  # noqa: E402
from geochat.chat.service import Service  # noqa: E402
from tests.chat.conftest import QUESTIONS  # noqa: E402

NEW = 10


@pytest.fixture
def service(chat: Chat) -> Iterator[Service]:
    service = Service(Chat(chat.model, chat.processor), batch_size=4)
    yield service
    service.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The model makes no step before the gate is open."""
    event, step = threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: event.wait(30) and step(batch))
    yield event
    event.set()


def test_every_answer_is_its_single_users_answer(
    chat: Chat, service: Service, requests: list[Request]
) -> None:
    tickets = [service.submit(request, user=i % 3, max_new_tokens=NEW) for i, request in enumerate(requests)]
    texts = ["".join(ticket) for ticket in tickets]
    expected = chat.answer(requests, max_new_tokens=NEW)
    assert [ticket.answer for ticket in tickets] == expected
    assert texts == [answer.text for answer in expected]


def test_conversations_of_several_users_at_once(chat: Chat, service: Service, tiny_records) -> None:
    """Each thread holds a conversation of three turns on a picture of its own, or on a shared one."""
    pictures = sorted(tiny_records.image_folder.iterdir())
    said: dict[int, list[str]] = {}

    def talk(user: int) -> None:
        request = Request.ask(QUESTIONS[user % 5], pictures[user % 3])
        said[user] = []
        for question in ("How many?", "Where?", "Which?"):
            said[user].append("".join(service.submit(request, user=user, max_new_tokens=NEW)))
            request = request.follow(said[user][-1], question)

    threads = [threading.Thread(target=talk, args=(user,)) for user in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for user, texts in said.items():
        request = Request.ask(QUESTIONS[user % 5], pictures[user % 3])
        for text, question in zip(texts, ("How many?", "Where?", "Which?"), strict=True):
            assert text == chat.answer([request], max_new_tokens=NEW)[0].text
            request = request.follow(text, question)


def test_each_users_first_comes_before_anyones_second(
    service: Service, requests: list[Request], gate: threading.Event
) -> None:
    running = service.submit(requests[0], user="a", max_new_tokens=NEW)
    service._batch_size = 1
    while running.position:
        pass
    users = "aaabbc"
    tickets = [service.submit(requests[1], user=user, max_new_tokens=1) for user in users]
    # a has one running already
    assert [ticket.position for ticket in tickets] == [3, 5, 6, 1, 4, 2]
    gate.set()
    for ticket in tickets:
        list(ticket)
    assert [ticket.position for ticket in (running, *tickets)] == [0] * 7


def test_a_cancelled_request_leaves_its_place(
    chat: Chat, service: Service, requests: list[Request], gate: threading.Event
) -> None:
    service._batch_size = 1
    first = service.submit(requests[0], max_new_tokens=2000)
    second = service.submit(requests[1], max_new_tokens=NEW)
    third = service.submit(requests[2], max_new_tokens=NEW)
    third.cancel()
    assert list(third) == []
    first.cancel()
    gate.set()
    text = "".join(first)
    assert first.answer is not None
    assert first.answer.text == text
    assert not first.answer.finished
    assert len(first.answer.token_ids) < 2000
    assert "".join(second) == chat.answer([requests[1]], max_new_tokens=NEW)[0].text


def test_an_error_ends_one_request_alone(
    chat: Chat, service: Service, requests: list[Request], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    embed, fails = Batch._embed, requests[5].images[0]

    def broken(batch, rows, parts):
        if any(fails in row.prompt.pictures for row in rows):
            raise MemoryError("no room")
        return embed(batch, rows, parts)

    monkeypatch.setattr(Batch, "_embed", broken)
    good = [service.submit(request, max_new_tokens=NEW) for request in requests[:3]]
    unreadable = service.submit(Request.ask("What?", tmp_path / "bad.png"), max_new_tokens=NEW)
    failing = service.submit(requests[5], max_new_tokens=NEW)
    good.append(service.submit(requests[3], max_new_tokens=NEW))
    with pytest.raises(ValueError, match=r"bad\.png: not an image file"):
        list(unreadable)
    with pytest.raises(MemoryError, match="no room"):
        list(failing)
    assert failing.answer is None
    assert ["".join(ticket) for ticket in good] == [
        answer.text for answer in chat.answer(requests[:4], max_new_tokens=NEW)
    ]


def test_a_step_that_fails_costs_the_last_to_come(
    chat: Chat, service: Service, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Batch.step

    def crowded(batch):
        if len(batch.rows) > 2:
            raise MemoryError("no room")
        return step(batch)

    monkeypatch.setattr(Batch, "step", crowded)
    tickets = [service.submit(request, max_new_tokens=NEW) for request in requests[:5]]
    texts, failures = [], 0
    for ticket in tickets:
        try:
            texts.append("".join(ticket))
        except MemoryError:
            failures += 1
            continue
        assert texts[-1] == chat.answer([requests[tickets.index(ticket)]], max_new_tokens=NEW)[0].text
    assert failures >= 1
    assert len(texts) >= 2


def test_an_answer_stands_though_its_conversation_cannot_be_kept(
    chat: Chat, service: Service, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(batch, row, place):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Batch, "_whole", full)
    texts = ["".join(service.submit(requests[1], max_new_tokens=NEW))]
    cancelled = service.submit(requests[0], max_new_tokens=2000)
    next(iter(cancelled))
    cancelled.cancel()
    list(cancelled)
    texts.append("".join(service.submit(requests[2], max_new_tokens=NEW)))
    assert texts == [answer.text for answer in chat.answer(requests[1:3], max_new_tokens=NEW)]


def test_refusals(service: Service, requests: list[Request], gate: threading.Event) -> None:
    with pytest.raises(ValueError, match="0 <image> in the text for 1 images"):
        service.submit(Request(("x.png",), Request.ask("a").turns))
    with pytest.raises(ValueError, match="must be at least 1"):
        service.submit(requests[0], max_new_tokens=0)
    service._max_waiting, service._batch_size = 2, 1
    tickets = [service.submit(requests[0], max_new_tokens=2)]
    while tickets[0].position:
        pass
    tickets += [service.submit(requests[0], max_new_tokens=2) for _ in range(2)]
    with pytest.raises(ValueError, match="2 requests are waiting already"):
        service.submit(requests[0])
    gate.set()
    for ticket in tickets:
        list(ticket)


def test_closing_ends_what_waits(chat: Chat, requests: list[Request], gate: threading.Event) -> None:
    service = Service(chat, batch_size=1)
    tickets = [service.submit(request, max_new_tokens=200) for request in requests[:3]]
    gate.set()
    service.close()
    for ticket in tickets[1:]:
        with pytest.raises(ValueError, match="the service was closed"):
            list(ticket)
    with pytest.raises(ValueError, match="the service is closed"):
        service.submit(requests[0])
