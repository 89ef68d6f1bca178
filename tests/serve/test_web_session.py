"""A user of the demo: pictures, questions, stopping, starting again, leaving."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from geochat.chat.engine import Chat, Request
from geochat.data.boxes import parse_regions
from geochat.data.draw import draw_regions
from geochat.serve.streams import Streams
from geochat.serve.web_session import KEPT_FOLDERS, Session, Sessions

BOXED = "<p>two ships</p> {<10><20><40><60>|<90>}{<50><20><80><60>|<90>}"


class Parrot:
    """A chat that answers with the last word of the question, as often as it is asked to."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.go = threading.Event()
        self.go.set()

    def stream(self, request: Request, **options) -> Iterator[str]:
        self.requests.append(request)
        word = request.turns[-1].text.split("\n")[-1]
        if word == "fail":
            raise RuntimeError("out of memory")
        for piece in [word, " ", word]:
            yield piece
            assert self.go.wait(20)


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("a", tmp_path / "a")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "scene.png"
    Image.effect_noise((120, 80), 30).convert("RGB").save(file)
    return file


def follow(session: Session, service: Streams, question: str) -> list[int]:
    return list(session.ask(service, question))


def test_a_real_model_answers_as_it_does_alone(session: Session, picture: Path, tiny_model: Path) -> None:
    chat = Chat.load(tiny_model, device="cpu")
    session.show(picture)
    request, answers = None, []
    for question in ("What is this?", "And why?"):
        list(session.ask(Streams(chat), question, max_new_tokens=6))
        request = request.follow(answers[-1], question) if request else Request.ask(question, picture)
        answers.append(chat.answer([request], max_new_tokens=6)[0].text)
    assert [exchange.answer for exchange in session.exchanges] == answers


def test_a_conversation_keeps_its_turns_and_a_new_picture_ends_it(
    session: Session, picture: Path, parrot: Parrot
) -> None:
    service = Streams(parrot)
    follow(session, service, "no picture yet")
    session.show(picture)
    assert session.exchanges == []
    assert follow(session, service, "one") == [0, 0, 0]
    follow(session, service, "two")
    assert [len(request.turns) for request in parrot.requests] == [1, 1, 3]
    assert [turn.text for turn in parrot.requests[2].turns] == ["<image>\none", "one one", "two"]
    assert session.take_back() == "two"
    assert [exchange.question for exchange in session.exchanges] == ["one"]
    session.forget()
    follow(session, service, "three")
    assert len(parrot.requests[-1].turns) == len(parrot.requests[-1].images) == 1
    session.clear()
    assert not session.folder.exists()
    with pytest.raises(ValueError, match="no answer yet"):
        session.take_back()


def test_failures_leave_no_exchange_and_free_the_place(session: Session, parrot: Parrot) -> None:
    service = Streams(parrot)
    with pytest.raises(ValueError, match="write a question"):
        follow(session, service, " \n")
    with pytest.raises(RuntimeError, match="out of memory"):
        follow(session, service, "fail")
    assert session.exchanges == []
    assert service.line == []
    follow(session, service, "well")
    assert session.exchanges[0].answer == "well well"


def test_stopping_keeps_what_has_arrived_and_frees_the_place(session: Session, parrot: Parrot) -> None:
    service = Streams(parrot)
    parrot.go.clear()
    answer = session.ask(service, "slow")
    next(answer)
    with pytest.raises(ValueError, match="stop it first"):
        follow(session, service, "another")
    session.stop()
    parrot.go.set()
    list(answer)
    assert [exchange.answer for exchange in session.exchanges] == ["slow"]
    assert service.line == []
    assert follow(session, service, "another")


def test_leaving_during_an_answer_changes_no_later_conversation(session: Session, parrot: Parrot) -> None:
    service = Streams(parrot)
    answer = session.ask(service, "first")
    next(answer)
    session.forget()
    follow(session, service, "second")
    list(answer)
    answer.close()
    assert [exchange.answer for exchange in session.exchanges] == ["second second"]


def test_who_waits_sees_the_place_in_the_queue(tmp_path: Path, parrot: Parrot) -> None:
    service = Streams(parrot)
    users = [Session(name, tmp_path / name) for name in "abc"]
    answers = [user.ask(service, user.name) for user in users]
    assert [next(answer) for answer in answers] == [0, 1, 2]
    users[1].stop()
    assert next(answers[2]) == 1
    assert list(answers[0]) == [0, 0]
    assert set(answers[2]) == {0}
    assert list(answers[1]) == []
    assert [len(user.exchanges) for user in users] == [1, 0, 1]


def test_leaving_the_queue_while_the_place_is_looked_up(parrot: Parrot) -> None:
    class Line(list):
        def __contains__(self, stream: object) -> bool:
            found = super().__contains__(stream)
            if leaving.ident is None:
                leaving.start()
                leaving.join(0.2)
            return found

    service = Streams(parrot)
    service.submit(Request.ask("first"))
    second = service.submit(Request.ask("second"))
    leaving = threading.Thread(target=second.cancel)
    service.line = Line(service.line)
    assert second.position == 1
    leaving.join(20)
    assert len(service.line) == 1


def test_closing_ends_who_is_answered_and_who_waits(tmp_path: Path, parrot: Parrot) -> None:
    service = Streams(parrot)
    users = [Session(name, tmp_path / name) for name in "ab"]
    answers = [user.ask(service, user.name) for user in users]
    assert [next(answer) for answer in answers] == [0, 1]
    service.close()
    assert [list(answer) for answer in answers] == [[], []]
    assert service.line == []


def test_files_are_the_sessions_own_and_do_not_pile_up(
    session: Session, picture: Path, parrot: Parrot
) -> None:
    assert session.draw() is None
    assert session.save_answer() == (None, None)
    session.show(picture)
    assert session.save_answer() == (None, None)
    follow(session, Streams(parrot), "nothing")
    png, boxes = session.save_answer()
    assert png is None
    assert json.loads(boxes.read_text())["features"] == []
    follow(session, Streams(parrot), BOXED)
    png, boxes = session.save_answer()
    answer = session.exchanges[-1].answer
    with Image.open(picture) as original, Image.open(png) as drawn:
        assert np.array_equal(drawn, draw_regions(original, parse_regions(answer), min_side=1))
    drawings = [session.draw() for _ in range(3 * KEPT_FOLDERS)]
    assert [file.is_file() for file in drawings] == [False] * 2 * KEPT_FOLDERS + [True] * KEPT_FOLDERS
    assert png.is_file()  # drawing a box on the picture leaves the answer's files alone
    assert all(session.folder in file.parents for file in (png, boxes, drawings[0]))


def test_taps_count_in_pixels_of_the_picture_on_the_screen(session: Session, picture: Path) -> None:
    session.tap(3, 3, 0)  # no picture: nothing to draw on
    session.show(picture)
    with Image.open(session.draw()) as shown:
        width, height = shown.size
    assert width > 120  # enlarged
    session.tap(0.25 * width, 0.25 * height, 0)
    session.tap(0.75 * width, 0.75 * height, 0)
    assert session.box().envelope(120, 80) == pytest.approx((30, 20, 90, 60))


def test_a_photograph_taken_sideways_is_turned_upright(session: Session, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), "blue")
    image.paste("red", (0, 0, 60, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    session.show(tmp_path / "phone.jpg")
    assert session.size == (40, 60)
    with Image.open(session.picture) as upright:
        red, _, blue = upright.convert("RGB").getpixel((37, 30))
    assert red > 200 > 100 > blue


def test_every_picture_is_shown_or_refused_in_one_line(session: Session, odd_pictures) -> None:
    for file in odd_pictures.shown:
        session.show(file)
        with Image.open(session.draw()) as shown:
            assert len(shown.convert("L").getcolors(1 << 24)) > 20, file.name
    refused = {}
    for file in odd_pictures.refused:
        with pytest.raises(ValueError) as error:
            session.show(file)
        refused[file.name] = str(error.value)
    assert all(text.startswith(f"{name}: ") and "\n" not in text for name, text in refused.items())
    assert "900000000 pixels" in refused["bomb.png"]
    assert "empty" in refused["empty.png"]
    assert "8 bits" in refused["deep.png"]


def test_sessions_are_apart_bounded_and_leave_nothing(tmp_path: Path, picture: Path) -> None:
    sessions = Sessions(tmp_path / "sessions", most=3)
    for name in "abcd":
        sessions[name].show(picture)
    assert len(sessions) == len(list((tmp_path / "sessions").iterdir())) == 3
    assert sessions["d"] is sessions["d"] is not sessions["c"]
    for name in "abcd":
        sessions.close(name)
    assert list((tmp_path / "sessions").iterdir()) == []
