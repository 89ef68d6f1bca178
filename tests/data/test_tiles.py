"""Tiles cover a scene, and the boxes of tiles become its objects, each once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.data.boxes import Box, polygon_iou
from geochat.data.tiles import Detection, Tile, detections, merge, tile_scene

sizes = st.integers(1, 3000)


@given(sizes, sizes, st.integers(100, 600), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]))
def test_tiles_cover_the_scene_and_stay_in_it(width: int, height: int, side: int, overlap: float):
    tiles = tile_scene(width, height, side, overlap)
    assert len(set(tiles)) == len(tiles)
    for starts, length in (({t.left for t in tiles}, width), ({t.top for t in tiles}, height)):
        ordered = sorted(starts)
        assert ordered[0] == 0
        assert ordered[-1] + min(side, length) == length
        assert all(b - a <= side * (1 - overlap) for a, b in pairwise(ordered))
    assert {(t.width, t.height) for t in tiles} == {(min(side, width), min(side, height))}
    assert len(tiles) == len({t.left for t in tiles}) * len({t.top for t in tiles})


def test_no_more_tiles_than_needed():
    assert len(tile_scene(4000, 4000, 504, 0.25)) == 121
    assert len(tile_scene(1000, 500, 500, 0)) == 2
    assert tile_scene(300, 200, 504, 0.25) == [Tile(0, 0, 300, 200)]


@pytest.mark.parametrize(("side", "overlap"), [(0, 0.25), (100, 1.0), (100, -0.1), (100, float("nan"))])
def test_impossible_tiles_are_refused(side: int, overlap: float):
    with pytest.raises(ValueError, match="tile"):
        tile_scene(1000, 1000, side, overlap)


def test_boxes_are_moved_to_the_scene():
    tile = Tile(300, 100, 200, 400)
    found = detections("<p>a ship</p> {<40><30><60><60>|<30>} and {<-10><0><5><5>|<90>}", tile, 1000, 1000)
    expected = Box(40, 30, 60, 60, 30).polygon(200, 400) + (300, 100)  # noqa: RUF005 - an array
    assert np.allclose(found[0].polygon, expected)
    assert [one.phrase for one in found] == ["a ship", "a ship"]
    assert found[1].inset < 0 < found[0].inset


def test_the_edges_of_the_scene_cut_nothing():
    text = "{<0><0><10><10>|<90>}"
    assert detections(text, Tile(0, 0, 100, 100), 100, 100)[0].inset == 1.0
    assert detections(text, Tile(0, 0, 100, 100), 200, 100)[0].inset == pytest.approx(0.9)
    assert detections(text, Tile(100, 0, 100, 100), 200, 100)[0].inset == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ship", "2 red ships at the top left", True),
        ("a Storage Tank", "three storage tanks", True),
        ("1 bus", "buses near the house", True),
        ("", "", True),
        ("ship", "plane", False),
        ("", "ship", False),
    ],
)
def test_kinds_are_what_phrases_name(one: str, other: str, same: bool):
    square = np.zeros((4, 2))
    assert (Detection(one, square, 0).kind == Detection(other, square, 0).kind) == same


def square(x: float, y: float, side: float, inset: float = 0.5, phrase: str = "ship") -> Detection:
    return Detection(phrase, np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)]), inset)


def test_an_object_of_two_tiles_is_kept_once_where_it_is_seen_best():
    near_the_edge, inside = square(0, 0, 10, 0.05), square(1, 0, 10, 0.4)
    assert merge([near_the_edge, inside]) == [inside]
    assert merge([inside, near_the_edge]) == [inside]
    assert len(merge([inside, square(8, 0, 10, 0.05)])) == 2


def test_kinds_do_not_swallow_one_another():
    assert len(merge([square(0, 0, 10), square(0, 0, 10, phrase="plane"), square(0, 0, 10, 0.2)])) == 2


def test_what_its_tile_cut_off_is_part_of_the_whole():
    whole = square(0, 0, 100)
    assert merge([square(0, 40, 20, inset=0.0), whole]) == [whole]
    assert len(merge([square(0, 40, 20, inset=0.1), whole])) == 2  # small, but seen whole


def test_boxes_without_area_are_dropped():
    assert merge([square(5, 5, 0)]) == []


def test_a_turned_box_does_not_swallow_its_neighbour():
    """Two ships side by side at 45 degrees: their envelopes overlap, they do not."""
    first = Detection("ship", Box(10, 40, 60, 50, 45).polygon(100, 100), 0.5)
    second = Detection("ship", Box(22, 40, 72, 50, 45).polygon(100, 100), 0.4)
    assert (
        polygon_iou(first.polygon, second.polygon) < 0.1 < polygon_iou(first.polygon, second.polygon, "hbb")
    )
    assert merge([first, second]) == [first, second]


@given(st.integers(0, 2**32 - 1), st.floats(0, 180))
def test_an_object_that_fits_into_the_overlap_is_found_once_and_exactly(seed: int, angle: float):
    rng = np.random.default_rng(seed)
    width, height, side = 700, 500, 200
    x, y = rng.uniform(30, width - 30), rng.uniform(30, height - 30)
    truth = Box(x - 20, y - 10, x + 20, y + 10, angle).polygon(100, 100)
    found = []
    for tile in tile_scene(width, height, side, 0.25):
        local = truth - (tile.left, tile.top)
        if local.max() > 0 and (local.min(axis=0) < side).all():
            found.append(Detection("ship", truth, float(min(local.min(), side - local.max())) / side))
    kept = merge(found)
    assert len(kept) == 1
    assert np.array_equal(kept[0].polygon, truth)
