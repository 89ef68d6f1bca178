"""What the demo shows: coloured pieces, a box that is being drawn, shortcuts, downloads."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from geochat.data.boxes import Box, parse_boxes, parse_regions
from geochat.data.draw import colour, draw_regions
from geochat.data.phrases import SHORT
from geochat.serve.web_view import (
    LONGEST_SIDE,
    TASKS,
    Draft,
    coloured,
    geojson,
    on_screen,
    readable,
    reduced,
    shortcut,
    to_download,
)

GROUNDED = (
    "A harbour with <p>two grey ships</p> {<10><20><30><40>|<30>}<delim>{<50><50><60><60>|<90>} and "
    "<p>1 pier</p> {<0><0><9><9>|<90>}."
)


def test_pieces_carry_the_colours_of_their_boxes() -> None:
    assert coloured(GROUNDED) == [
        ("A harbour with ", None),
        ("two grey ships", "1"),
        (" and ", None),
        ("1 pier", "2"),
        (".", None),
    ]
    boxes = "{<1><2><30><40>|<5>}"
    assert coloured(boxes + boxes) == [(boxes, "1"), (boxes, "1")]
    many = "".join(f"<p>p{n}</p> {boxes} " for n in range(9))
    assert [label for _, label in coloured(many) if label] == ["1", "2", "3", "4", "5", "6", "7", "8", "1"]
    assert colour(8) == colour(0)


@pytest.mark.parametrize(
    "text", ["", "yes", "<img src=x onerror=alert(1)>", "a < b & c", "<p>", "}{", "{<1><2>"]
)
def test_answers_without_boxes_stay_as_they_are(text: str) -> None:
    assert readable(text) == ("" if text == "<p>" else text)


@given(st.text(alphabet="<p>/{}|10 d.e\n", max_size=60))
def test_pieces_number_the_regions_of_any_text(text: str) -> None:
    regions = parse_regions(text)
    numbers = [int(label) for _, label in coloured(text) if label]
    assert numbers == sorted(numbers) or len(regions) > 8
    assert all(number <= max(1, len(regions)) for number in numbers)


def test_what_is_not_complete_is_held_back_only_while_it_arrives() -> None:
    whole = "<p>a ship</p> {<10><20><30><40>|<30>} here, 1 < 2"
    for end in range(len(whole)):
        assert "{" not in readable(whole[:end], arriving=True)
        assert "<" not in readable(whole[:end], arriving=True)
    assert readable(whole) == "a ship here, 1 < 2"


def test_a_box_is_drawn_with_two_taps() -> None:
    draft = Draft().tap(20, 30)
    assert draft.box(200, 100) is None
    assert len(draft.outline(200, 100)) == 1
    draft = draft.tap(40, 60)
    assert (
        draft.box(200, 100).format() == "{<22><25><38><65>|<90>}"
    )  # upright: angle 90, sides exchanged in pixels
    assert draft.tap(5, 5).corners == ((5, 5),)
    assert Draft().tap(20, 30).tap(20.4, 60).corners == ((20.4, 60),)  # no area


@given(
    st.floats(0, 60),
    st.floats(0, 60),
    st.floats(5, 40),
    st.floats(5, 40),
    st.integers(-90, 90),
)
def test_the_turn_is_clockwise_and_the_corners_order_does_not_matter(x, y, w, h, angle) -> None:
    first = Draft(angle=angle).tap(x, y).tap(x + w, y + h).box(300, 200)
    second = Draft(angle=angle).tap(x, y + h).tap(x + w, y).box(300, 200)
    assert first.iou(Box(x, y, x + w, y + h, angle), 300, 200) > 0.999
    assert first.iou(second, 300, 200) > 0.999
    assert 0 < first.angle <= 90


def test_shortcuts_keep_what_was_typed() -> None:
    box = Box(10, 20, 30, 40, 50)
    assert shortcut("[refer]", "the red plane") == "[refer] Give me the location of <p> the red plane </p>"
    assert shortcut("[refer]", shortcut("[refer]", "the red plane")) == shortcut("[refer]", "the red plane")
    assert shortcut("Question", "Is it day?") == f"Is it day?\n{SHORT}"
    assert shortcut("Question", shortcut("Question", "Is it day?")) == f"Is it day?\n{SHORT}"
    assert shortcut("[identify]", "", box).endswith("at {<10><20><30><40>|<50>}")
    assert parse_boxes(shortcut("[identify]", "", box)) == [box]
    for task in TASKS:
        for other in TASKS:
            assert shortcut(task, shortcut(other, "", box), box)
    assert "<p> the ship </p>" in shortcut("[refer]", shortcut("Describe", ""))
    with pytest.raises(ValueError, match="tap two opposite corners"):
        shortcut("[identify]", "the plane")


def test_large_pictures_are_shown_small_and_downloaded_whole() -> None:
    image = Image.effect_noise((4000, 1000), 40).convert("RGB")
    small = reduced(image)
    assert small.size == (LONGEST_SIDE, LONGEST_SIDE // 4)
    assert reduced(small) is small
    download = to_download(image, GROUNDED)
    assert download.size == image.size
    assert np.array_equal(download, draw_regions(image, parse_regions(GROUNDED), min_side=1))


def test_the_users_own_box_is_drawn_dashed() -> None:
    image = Image.new("RGB", (600, 600), (40, 60, 40))
    draft = Draft().tap(25, 25).tap(75, 75)
    drawn = np.asarray(on_screen(image, "", draft))
    edge = drawn[150, 150:450].min(axis=1)
    assert 0.2 < (edge > 240).mean() < 0.8  # white, with gaps
    assert (drawn[300, 200:400] == (40, 60, 40)).all()


def test_geojson_holds_the_boxes_and_what_they_answer() -> None:
    table = json.loads(geojson("Where?", GROUNDED, 800, 400))
    assert table["type"] == "FeatureCollection"
    assert [f["properties"]["phrase"] for f in table["features"]] == [
        "two grey ships",
        "two grey ships",
        "1 pier",
    ]
    ring = np.array(table["features"][0]["geometry"]["coordinates"][0])
    truth = parse_boxes(GROUNDED)[0].polygon(800, 400)
    assert {tuple(point) for point in ring.round(6)} == {tuple(point) for point in truth.round(6)}
    assert (table["question"], table["answer"], table["width"]) == ("Where?", GROUNDED, 800)
