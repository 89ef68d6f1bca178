"""Drawing: boxes land where they belong, and nothing breaks on odd input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from geochat.data.boxes import Box, Region
from geochat.data.draw import colour, contact_sheet, draw_regions

GREY = Image.new("RGB", (600, 400), (90, 90, 90))


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    box = ImageChops.difference(before.resize(after.size), after).getbbox()
    assert box is not None
    return box


def test_an_outline_follows_the_oriented_box():
    box = Box(20, 45, 80, 55, 30)
    drawn = draw_regions(GREY, [box], min_side=400)
    left, top, right, bottom = box.envelope(*drawn.size)
    assert np.allclose(changed(GREY, drawn), (left, top, right, bottom), atol=6)
    # The right end goes down: clockwise on screen.
    x, y = box.polygon(*drawn.size)[1:3].mean(axis=0)
    pixel = drawn.getpixel((round(x) - 1, round(y)))
    assert max(abs(a - b) for a, b in zip(pixel, colour(0))) < 80


def test_the_picture_itself_is_not_touched():
    copy = GREY.copy()
    draw_regions(GREY, [Region("a ship", [Box(10, 10, 50, 50, 5)])], truth=[Box(5, 5, 20, 20)])
    assert ImageChops.difference(copy, GREY).getbbox() is None


def test_small_pictures_are_enlarged():
    assert draw_regions(Image.new("L", (84, 84)), [Box(1, 1, 9, 9)]).size == (504, 504)
    assert draw_regions(GREY, []).size == GREY.size
    assert draw_regions(Image.new("L", (30_000, 2)), [Box(1, 1, 9, 9)]).size == (30_000, 2)
    assert draw_regions(Image.new("L", (2, 100)), [Box(1, 1, 9, 9)]).size == (80, 4000)


def test_labels_are_written_beside_the_box():
    region = Region("a red ship", [Box(30, 40, 60, 60, 90)])
    without, written = draw_regions(GREY, [region.boxes[0]]), draw_regions(GREY, [region])
    left, top, right, bottom = changed(without, written)
    assert bottom <= region.boxes[0].envelope(*GREY.size)[1] + 2
    assert 0 <= left < right <= 600
    assert top >= 0


def test_other_labels_may_be_given():
    one = draw_regions(GREY, [Box(30, 40, 60, 60)], labels=["ship"])
    assert (
        ImageChops.difference(one, draw_regions(GREY, [Region("ship", [Box(30, 40, 60, 60)])])).getbbox()
        is None
    )
    with pytest.raises(ValueError, match="1 labels for 2 regions"):
        draw_regions(GREY, [Box(1, 1, 2, 2), Box(3, 3, 4, 4)], labels=["a"])


def test_labels_of_neighbours_do_not_lie_on_each_other():
    boxes = [Box(30, 50, 40, 60), Box(31, 50, 41, 60), Box(32, 50, 42, 60)]
    drawn = draw_regions(GREY, boxes, labels=["first", "second", "third"])
    plates = [np.abs(np.asarray(drawn).astype(int) - colour(k)).sum(axis=2) < 30 for k in range(3)]
    rows = [set(np.flatnonzero(plate.sum(axis=1) > 25).tolist()) for plate in plates]
    assert all(rows)
    assert not rows[0] & rows[1]


numbers = st.integers(-300, 1300)
any_box = st.builds(Box, numbers, numbers, numbers, numbers, st.integers(0, 90))


@given(
    regions=st.lists(st.builds(Region, st.text(max_size=40), st.lists(any_box, max_size=3)), max_size=3),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
@settings(max_examples=40, deadline=None)
def test_no_box_and_no_phrase_breaks_it(regions: list[Region], size: tuple[int, int]):
    drawn = draw_regions(Image.new("RGB", size), regions, truth=regions, min_side=64)
    assert drawn.mode == "RGB"


def test_the_contact_sheet_holds_every_picture():
    pictures = [(Image.new("RGB", (50 + 40 * k, 80), colour(k)), f"caption {k}") for k in range(5)]
    sheet = contact_sheet(pictures, columns=3, side=100)
    seen = {tuple(pixel) for pixel in np.asarray(sheet).reshape(-1, 3)[::7].tolist()}
    assert {colour(k) for k in range(5)} <= seen
    assert sheet.width == 3 * 105 + 5


def test_an_empty_contact_sheet_is_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])


def test_colours_are_distinct_and_repeat():
    assert len({colour(k) for k in range(8)}) == 8
    assert colour(8) == colour(0)
