"""Reading LLaVA and GeoChat records."""

from __future__ import annotations

from pathlib import Path

import pytest

from geochat.data.sample import IMAGE_TOKEN, ImageCountError, Sample, Turn, user_turn


def record(*texts: str, first: str = "human", **keys) -> dict:
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    turns = [{"from": speakers[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"id": "a", "conversations": turns, **keys}


def test_one_image_as_a_string():
    sample = Sample.from_record(record("<image>\nWhat?", "A ship.", image="x.png"))
    assert sample == Sample("a", ("x.png",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "A ship.")))


def test_images_as_a_list():
    sample = Sample.from_record(record("<image><image> Which?", "The first.", image=["x.png", "y.png"]))
    assert sample.images == ("x.png", "y.png")
    assert sample.turns[0].text == "<image>\n<image>\nWhich?"


def test_the_folder_of_vhm_lists():
    sample = Sample.from_record(record("<image>\nWhat?", "A ship.", image="a/x.png", source_dataset="fmow"))
    assert sample.images == ("fmow/a/x.png",)
    assert Sample.from_record(sample.to_record()) == sample
    assert Sample.from_record(record("Hello", "Hi", source_dataset="fmow")).images == ()


@pytest.mark.parametrize("keys", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_no_image(keys: dict):
    assert Sample.from_record(record("Hello", "Hi", **keys)).images == ()


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("What is <image> this?", "<image>\nWhat is  this?"),
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("<image>What is this?", "<image>\nWhat is this?"),
        ("<image>", "<image>"),
    ],
)
def test_the_mark_moves_to_the_front(text: str, moved: str):
    assert Sample.from_record(record(text, "ok", image="x.png")).turns[0].text == moved


def test_turns_without_a_mark_keep_their_space():
    sample = Sample.from_record(record("<image>\na", "b", "\n[refer] where ?", " c ", image="x.png"))
    assert [turn.text for turn in sample.turns[1:]] == ["b", "\n[refer] where ?", " c "]


@pytest.mark.parametrize("speaker", ["gpt", "system"])
def test_a_first_turn_that_is_not_human_is_dropped(speaker: str):
    rows = record("hello", "<image>\nq", "a", first="gpt", image="x.png")
    rows["conversations"][0]["from"] = speaker
    assert [turn.text for turn in Sample.from_record(rows).turns] == ["<image>\nq", "a"]


def test_an_integer_id_becomes_text_and_a_missing_one_empty():
    assert Sample.from_record({**record("q", "a"), "id": 7}).id == "7"
    rows = record("q", "a")
    del rows["id"]
    assert Sample.from_record(rows).id == ""


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "expected an object"),
        ({"id": 1}, "must be a list of turns"),
        ({"conversations": []}, "must be a list of turns"),
        ({"conversations": ["hi"]}, "turn 0: expected"),
        ({"conversations": [{"from": "human"}]}, "turn 0: .*must be text"),
        (record("q"), "turn 0 has no answer"),
        (record("q", "a", "q"), "turn 2 has no answer"),
        (record("a", first="gpt"), "no question follows"),
        (record("a", "q", first="gpt"), "turn 1 has no answer"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "robot", "value": "a"}]},
            "unknown speaker 'robot'",
        ),
        ({"conversations": [{"from": "human", "value": "q"}] * 2}, "turn 1: two user turns in a row"),
        (record("q", "a", image=7), "must be a path"),
        (record("q", "a", image=["a.png", 1]), "must be a path"),
    ],
)
def test_malformed_records_are_named(rows: object, reason: str):
    with pytest.raises(ValueError, match=f"^train.json:row 3: .*{reason}"):
        Sample.from_record(rows, "train.json:row 3")


@pytest.mark.parametrize(
    "rows",
    [
        record("q", "a", image="x.png"),
        record("<image> q", "a"),
        record("<image><image>", "a", image="x.png"),
        record("q", "<image> a", image="x.png"),
    ],
)
def test_wrong_numbers_of_marks(rows: dict):
    with pytest.raises(ImageCountError, match=IMAGE_TOKEN):
        Sample.from_record(rows, "row 1")


@pytest.mark.parametrize("image", [{}, {"image": "x.png"}, {"image": ["x.png", "y.png"]}])
def test_a_sample_survives_writing_and_reading(image: dict):
    images = image.get("image", [])
    marks = IMAGE_TOKEN * (1 if isinstance(images, str) else len(images))
    sample = Sample.from_record(record(f"{marks}What?", "This.", "And?", "That.", **image))
    assert Sample.from_record(sample.to_record()) == sample


def test_user_turn_adds_the_marks_that_miss():
    assert user_turn("What?", 1).text == "<image>\nWhat?"
    assert user_turn("What <image>?", 1).text == "<image>\nWhat ?"
    assert user_turn("What <image>?", 2).text == "<image>\n<image>\nWhat ?"
    assert user_turn("What?").text == "What?"


def test_the_record_keys_stand_in_one_file_only():
    package = Path(__file__).resolve().parents[2] / "geochat"
    sources = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    for keys in (['"conversations"'], ['"gpt"'], ['"from"', '"value"']):
        holders = {name for name, text in sources.items() if all(key in text for key in keys)}
        assert holders == {"sample.py"}, f"{keys} occur in {sorted(holders)}"
