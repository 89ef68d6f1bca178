"""The decoding loop gives the tokens of transformers' own, one request at a time, whatever is answered together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from geochat.chat import batch as module  # noqa: E402
from geochat.chat import pictures  # noqa: E402
from geochat.chat.engine import Chat, Request  # noqa: E402
from geochat.chat.sampling import Settings  # noqa: E402
from tests.chat.conftest import QUESTIONS  # noqa: E402

NEW = 12


@pytest.fixture(params=["chat", "grouped"])
def model(request: pytest.FixtureRequest) -> Chat:
    return request.getfixturevalue(request.param)


def test_tokens_are_those_of_generate(model: Chat, requests: list[Request], generated: Callable) -> None:
    expected = [generated(model, request, NEW) for request in requests]
    assert len(set(expected)) > 5  # the questions are told apart
    for options in ({}, {"batch_size": 1}, {"batch_size": 3}, {"token_budget": 400}):
        fresh = Chat(model.model, model.processor)
        answers = fresh.answer(requests, max_new_tokens=NEW, **options)
        assert [answer.token_ids for answer in answers] == expected
    again = fresh.answer(requests[::-1], max_new_tokens=NEW)  # most of it is known by now
    assert [answer.token_ids for answer in again[::-1]] == expected


def test_answers_end_at_their_own_time(
    chat: Chat, requests: list[Request], generated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that are often said become stop tokens: some answers then end at once, others late or never."""
    said = [generated(chat, request, NEW) for request in requests]
    stops = [*chat._stops, said[0][0], said[1][2], said[5][4]]
    fresh = Chat(chat.model, chat.processor)
    for each in (chat, fresh):
        monkeypatch.setattr(each, "_stops", stops)
    expected = [generated(chat, request, NEW) for request in requests]
    lengths = {len(ids) for ids in expected}
    assert {0, NEW} < lengths
    answers = fresh.answer(requests, max_new_tokens=NEW, batch_size=5)
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.finished for answer in answers] == [len(ids) < NEW for ids in expected]


def test_answers_of_one_token(chat: Chat, requests: list[Request], generated: Callable) -> None:
    fresh = Chat(chat.model, chat.processor)
    alone = requests[::5]  # one question a picture: none of them needs room of its own
    expected = [generated(chat, request, 1) for request in alone]
    assert [answer.token_ids for answer in fresh.answer(alone, max_new_tokens=1)] == expected
    assert list(fresh.stream(requests[0], max_new_tokens=1)) == list(
        chat.stream(requests[0], max_new_tokens=1)
    )


def test_rows_join_and_leave_between_tokens(chat: Chat, requests: list[Request], generated: Callable) -> None:
    batch = Chat(chat.model, chat.processor).batch()
    rows = [chat.row(request, Settings(NEW)) for request in requests]
    waiting, ended = list(rows), []
    while waiting or batch.rows:
        ended += batch.admit([waiting.pop(0)]) if waiting else []
        ended += batch.step()
        if len(batch.rows) == 4:
            batch.drop(batch.rows[1])
    assert len(ended) < len(rows)
    for row in rows:
        expected = generated(chat, requests[rows.index(row)], NEW)
        assert tuple(row.ids) == expected[: len(row.ids)]
        assert (len(row.ids) == len(expected)) == (row in ended)


def test_a_broken_row_leaves_nothing_behind(
    chat: Chat, requests: list[Request], generated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are no numbers; the row that takes its place has them behind its mask."""
    batch = Chat(chat.model, chat.processor).batch()
    # The second has many tokens of its own; the last, which comes later, hardly any: it was asked before.
    asked = [requests[i] for i in (1, 4, 0, 1)]
    rows = [chat.row(request, Settings(NEW)) for request in asked]
    embed = module.Batch._embed

    def breaking(batch, of, parts):
        embeds = embed(batch, of, parts)
        for i, row in enumerate(of):
            if row is rows[2] and len(row.ids) == 2:
                embeds[i] = float("nan")
        return embeds

    monkeypatch.setattr(module.Batch, "_embed", breaking)
    batch.admit(rows[:3])
    while rows[2].error is None:
        batch.step()
    batch.admit(rows[3:])
    while batch.rows:
        batch.step()
    for i in (0, 1, 3):
        assert tuple(rows[i].ids) == generated(chat, asked[i], NEW)


def test_what_waits_is_looked_through_when_some_of_it_comes_in(
    chat: Chat, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at every token."""
    taken: list[int] = []
    admit = module.Batch.admit

    def counted(batch, rows, coming=()):
        taken.append(len(rows))
        return admit(batch, rows, coming)

    monkeypatch.setattr(module.Batch, "admit", counted)
    Chat(chat.model, chat.processor).answer(requests, max_new_tokens=NEW, token_budget=400)
    assert min(taken) > 0
    assert sum(taken) == len(requests)


@pytest.fixture
def computed(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that the language model computed, pass by pass, padding included."""
    passes: list[int] = []
    language = chat.model.model.language_model
    original = language.forward

    def counted(*args, **options):
        passes.append(options["inputs_embeds"].shape[0] * options["inputs_embeds"].shape[1])
        return original(*args, **options)

    monkeypatch.setattr(language, "forward", counted)
    return passes


def test_a_picture_is_computed_once_for_all_its_questions(
    chat: Chat, tiny_records, computed: list[int]
) -> None:
    image = tiny_records.image_folder / "wide.jpg"
    asked = [Request.ask(question, image) for question in QUESTIONS[:4]]
    lengths = [len(chat.row(request, Settings()).prompt.ids) for request in asked]
    Chat(chat.model, chat.processor, prefix_bytes=0).answer(asked, max_new_tokens=1)
    first, *others = computed
    assert first == min(lengths)  # the shortest question's whole prompt
    assert len(others) == 1
    assert others[0] < 3 * (max(lengths) - 36 - 20)  # the rest without picture and system sentence


def test_the_next_turn_begins_where_the_last_one_ended(
    chat: Chat, requests: list[Request], generated: Callable, computed: list[int]
) -> None:
    fresh = Chat(chat.model, chat.processor)
    request = requests[0]
    for question in ("How many?", "Where is it?", "Is it red?"):
        text = "".join(fresh.stream(request, max_new_tokens=NEW))
        request = request.follow(text, question)
        expected = generated(chat, request, NEW)
        del computed[:]
        assert fresh.answer([request], max_new_tokens=NEW)[0].token_ids == expected
        length = len(chat.row(request, Settings()).prompt.ids)
        assert computed[0] < length / 3, "only what is new is computed"


def test_keys_and_values_are_kept_within_bounds(chat: Chat, requests: list[Request]) -> None:
    one = 2 * 2 * 64 * 4  # keys and values, layers, hidden size, bytes of a float32
    longest = max(len(chat.row(request, Settings()).prompt.ids) for request in requests)
    small = Chat(chat.model, chat.processor, prefix_bytes=2 * one * longest)
    assert small.answer(requests, max_new_tokens=4) == chat.answer(requests, max_new_tokens=4)
    assert 0 < small._prefixes.nbytes <= 2 * one * longest
    for request in requests[:3]:
        list(small.stream(request, max_new_tokens=4))
    assert 0 < small._prefixes.nbytes <= 2 * one * longest


def test_each_picture_is_read_once(
    chat: Chat, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the questions fall into groups, and though pictures are read before their turn."""
    opened: list[object] = []
    original = pictures.open_image

    def counted(picture):
        opened.append(picture)
        return original(picture)

    monkeypatch.setattr(pictures, "open_image", counted)
    Chat(chat.model, chat.processor).answer(requests, max_new_tokens=3, batch_size=2)
    assert len(opened) == len(set(opened)) == 4


def test_an_unreadable_picture_ends_its_own_questions_alone(
    chat: Chat, requests: list[Request], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = [Request.ask(question, tmp_path / "bad.png") for question in QUESTIONS]
    half = Request.ask("What differs?", requests[0].images[0], tmp_path / "bad.png")
    mixed = [*requests[:3], *bad, half, *requests[3:]]
    fresh = Chat(chat.model, chat.processor)
    results = fresh.answer_each(mixed, max_new_tokens=4)
    assert [result for result in results if not isinstance(result, ValueError)] == chat.answer(
        requests, max_new_tokens=4
    )
    errors = [result for result in results if isinstance(result, ValueError)]
    assert len(errors) == len(bad) + 1
    assert all(str(error) == f"{tmp_path / 'bad.png'}: not an image file" for error in errors)


def test_what_one_pass_holds_is_bounded(
    chat: Chat, requests: list[Request], computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.PASS_TOKENS, "cpu", 300)
    fresh = Chat(chat.model, chat.processor)
    answers = fresh.answer(requests, max_new_tokens=4)
    longest = max(len(chat.row(request, Settings()).prompt.ids) for request in requests)
    assert max(computed) <= max(300, longest)
    monkeypatch.undo()
    assert answers == chat.answer(requests, max_new_tokens=4)


def test_a_drawn_answer_does_not_depend_on_what_is_drawn_beside_it(
    chat: Chat, requests: list[Request]
) -> None:
    settings = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    together = chat.answer(requests[:4], seed=3, **settings)
    alone = [chat.answer([request], seed=3 + i, **settings)[0] for i, request in enumerate(requests[:4])]
    assert together == alone
    assert together != chat.answer(requests[:4], seed=4, **settings)


def test_threads_may_ask_one_model(chat: Chat, requests: list[Request]) -> None:
    expected = chat.answer(requests, max_new_tokens=NEW)
    chats, found = [Chat(chat.model, chat.processor) for _ in range(2)], {}

    def ask(name: int) -> None:  # two threads share a chat, the third has one of its own for the same model
        found[name] = chats[name // 2].answer(requests[name::3], max_new_tokens=NEW, batch_size=3)

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: expected[name::3] for name in range(3)}
