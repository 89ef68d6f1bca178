"""Cutting large pictures into windows, with their labels."""

from __future__ import annotations

from collections.abc import Iterator

from geochat.data import tiles
from geochat.data.geometry import area, clip, convex_hull
from geochat.data.prepare.objects import LabelledObject, Picture

Rectangle = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the whole picture."""


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin along a side: `window - overlap` apart, the last one flush with the end.

    Raises:
        ValueError: an overlap that leaves no step.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"--overlap {overlap}: must be at least 0 and less than the window of {window}")
    return tiles.starts(length, window, window - overlap)


def windows(width: int, height: int, window: int, overlap: int) -> Iterator[Rectangle]:
    """Windows that cover a picture, row by row; a side shorter than the window is taken whole."""
    for top in starts(height, window, overlap):
        for left in starts(width, window, overlap):
            yield left, top, min(left + window, width), min(top + window, height)


def cut(picture: Picture, rectangle: Rectangle, name: str, visible: float) -> Picture:
    """What a window shows: objects of which at least the share `visible` is inside, clipped at its edges."""
    left, top, right, bottom = rectangle
    frame = convex_hull([(left, top), (right, top), (right, bottom), (left, bottom)])
    kept, cut_off = [], set(picture.cut_off)
    for item in picture.objects:
        x1, y1, x2, y2 = item.bounds
        if x1 >= right or x2 <= left or y1 >= bottom or y2 <= top:
            continue
        whole = left <= x1 and x2 <= right and top <= y1 and y2 <= bottom
        # Clipped corners may coincide or line up: the hull leaves such ones out.
        inside = item.outline if whole else tuple(convex_hull(clip(item.outline, frame)))
        share = 1.0 if whole else area(inside) / item.area
        if share >= visible:
            moved = tuple((x - left, y - top) for x, y in inside)
            kept.append(LabelledObject(item.label, moved, item.difficult))
        elif share > 0:
            cut_off.add(item.label)
    return Picture(name, right - left, bottom - top, tuple(kept), frozenset(cut_off))
