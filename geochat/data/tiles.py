"""A large scene as overlapping tiles, and the boxes of its tiles as the objects of the scene. Pixels, y down."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from geochat.data import geometry
from geochat.data.boxes import parse_regions
from geochat.data.phrases import plural

MERGE_IOU = 0.4
"""Two boxes of one kind that overlap this much are one object. Boxes in whole percent of a tile rarely reach 0.5."""
MERGE_SHARE = 0.6
"""A box that its tile cut off is part of another one that holds this share of it."""
_CUT = 0.02  # of a tile's side: boxes are rounded to whole percent, so one that ends here may go on behind the edge
_PLACE = re.compile(r"\s(?:at|in|on|of|near|beside|next|with|along|between)\s.*")


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of the scene."""

    left: int
    top: int
    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.left},{self.top},{self.width},{self.height}"


@dataclass(frozen=True, slots=True)
class Detection:
    """A box of one tile, in pixels of the scene."""

    phrase: str
    polygon: np.ndarray  # float64 [4, 2]
    inset: float
    """From the box to the nearest edge at which its tile was cut out of the scene, in sides of the tile."""

    @property
    def kind(self) -> str:
        """What the phrase names, without number, adjectives and place: "2 red ships at the top" and "ship" are one."""
        words = _PLACE.sub("", f"{self.phrase.lower()} ").split()
        return plural(words[-1]) if words else ""


def tile_scene(width: int, height: int, side: int, overlap: float) -> list[Tile]:
    """Square tiles that cover the scene row by row, neighbours sharing at least `overlap` of their side.

    What is smaller than `overlap` of a side lies wholly in at least one tile. A scene smaller than a tile is one.
    Raises ValueError for a side below 1 or an overlap outside [0, 0.9].
    """
    if side < 1:
        raise ValueError(f"a tile needs at least one pixel, found a side of {side}")
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"the overlap is a share of the tile's side between 0 and 0.9, found {overlap}")
    step = max(1, math.floor(side * (1 - overlap)))
    columns, rows = starts(width, side, step), starts(height, side, step)
    return [Tile(left, top, min(side, width), min(side, height)) for top in rows for left in columns]


def starts(length: int, side: int, step: int) -> list[int]:
    """Where tiles begin along an edge: `step` apart, the last one flush with the end."""
    return [*range(0, length - side, step), max(0, length - side)]


def detections(text: str, tile: Tile, width: int, height: int) -> list[Detection]:
    """The boxes of an answer about a tile, moved to the scene of `width` by `height`."""
    found = []
    corner = np.array((tile.left, tile.top))
    for region in parse_regions(text):
        for box in region.boxes:
            polygon = box.polygon(tile.width, tile.height)
            inset = _inset(polygon, tile, width, height)
            found.append(Detection(region.phrase, polygon + corner, inset))
    return found


def _inset(polygon: np.ndarray, tile: Tile, width: int, height: int) -> float:
    """`polygon` in pixels of the tile. The scene's own edges cut nothing."""
    (left, top), (right, bottom) = polygon.min(axis=0), polygon.max(axis=0)
    gaps = [
        (left, tile.left > 0, tile.width),
        (top, tile.top > 0, tile.height),
        (tile.width - right, tile.left + tile.width < width, tile.width),
        (tile.height - bottom, tile.top + tile.height < height, tile.height),
    ]
    return min((float(gap) / side for gap, cut, side in gaps if cut), default=1.0)


def merge(found: Iterable[Detection]) -> list[Detection]:
    """Each object once: rotated non-maximum suppression within each kind.

    Where tiles overlap, the box that its tile shows more of the surroundings of is kept: a model gives no confidence,
    but an object seen whole is placed better than one at an edge. A box with no area is dropped.
    """
    kept: dict[str, list[tuple[Detection, list[tuple[float, float]]]]] = {}
    envelopes: dict[str, np.ndarray] = {}
    for detection in sorted(found, key=lambda one: -one.inset):
        outline = geometry.convex_hull(detection.polygon.tolist())
        if geometry.area(outline) <= 0:
            continue
        kind = detection.kind
        others, around = kept.setdefault(kind, []), envelopes.get(kind, np.empty((0, 4)))
        (left, top), (right, bottom) = detection.polygon.min(axis=0), detection.polygon.max(axis=0)
        near = (around[:, 0] < right) & (around[:, 2] > left) & (around[:, 1] < bottom) & (around[:, 3] > top)
        if any(_same(detection, outline, others[i][1]) for i in np.flatnonzero(near)):
            continue
        others.append((detection, outline))
        envelopes[kind] = np.vstack([around, (left, top, right, bottom)])
    return [detection for group in kept.values() for detection, _ in group]


def _same(
    detection: Detection, outline: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> bool:
    if geometry.overlap(outline, other) >= MERGE_IOU:
        return True
    return detection.inset < _CUT and geometry.area(
        geometry.clip(outline, other)
    ) >= MERGE_SHARE * geometry.area(outline)
