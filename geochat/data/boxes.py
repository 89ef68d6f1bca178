"""GeoChat's oriented boxes: the one place that knows what `{<x1><y1><x2><y2>|<angle>}` means.

`x1 y1 x2 y2` are percent of the original image's width and height and describe a rectangle *before* rotation; the
rectangle is then turned in pixel space about its centre by `angle` degrees, clockwise on screen. The convention is
that of OpenCV >= 4.5.1 `minAreaRect`: angles lie in (0, 90], an upright object has angle 90 and width and height
exchanged. Values below 0 and above 100 are legal, since objects may leave the image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from geochat.data.geojson import feature_collection, polygon_feature
from geochat.data.geometry import convex_hull, overlap, smallest_rectangle

_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"
BOX_PATTERN = re.compile(
    r"\{\s*" + r"\s*".join(f"<{_NUMBER}>" for _ in range(4)) + rf"(?:\s*\|\s*<{_NUMBER}>)?(?:\s*\}})?"
)
"""Reads any box whose four coordinates are complete: angle, closing brace and neat spacing may be missing."""

GRAMMAR = re.compile(r"\{<(-?\d+)><(-?\d+)><(-?\d+)><(-?\d+)>\|<(\d+)>\}")
"""The exact form that training files should hold."""

DELIMITER = "<delim>"
_PHRASE = r"<p>(?P<phrase>.*?)(?:</p>|(?=<p>)|(?=\{\s*<)|$)"
_ITEM = re.compile(rf"{_PHRASE}|(?P<box>{BOX_PATTERN.pattern})", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"(?:\s|<delim>|,|;|\band\b)*")


@dataclass(frozen=True, slots=True)
class Box:
    """Corners in percent of the original image; angle in degrees, clockwise on screen."""

    x1: float
    y1: float
    x2: float
    y2: float
    angle: float = 0.0

    def polygon(self, width: float, height: float) -> np.ndarray:
        """Corners in pixels, float64 [4, 2], of an image `width` by `height`; not clipped to it.

        Order: the unrotated rectangle's top left, top right, bottom right, bottom left.
        """
        x1, x2 = sorted((self.x1 * width / 100, self.x2 * width / 100))
        y1, y2 = sorted((self.y1 * height / 100, self.y2 * height / 100))
        half_w, half_h = (x2 - x1) / 2, (y2 - y1) / 2
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        corners = np.array([(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)])
        return corners @ np.array([(cos, sin), (-sin, cos)]) + ((x1 + x2) / 2, (y1 + y2) / 2)

    @classmethod
    def from_polygon(cls, points: Sequence[Sequence[float]] | np.ndarray, width: float, height: float) -> Box:
        """Box of the smallest rectangle around points in pixels; the angle is in (0, 90].

        Raises:
            ValueError: no points, a coordinate that is not finite, or an image without extent.
        """
        _check_size(width, height)
        array = np.asarray(points, dtype=np.float64)
        if array.ndim != 2 or array.shape[1:] != (2,) or not np.isfinite(array).all():
            raise ValueError(f"expected a list of finite (x, y) points, found {points!r:.80}")
        cx, cy, w, h, angle = smallest_rectangle(array.tolist())
        sx, sy = 100 / width, 100 / height
        return cls((cx - w / 2) * sx, (cy - h / 2) * sy, (cx + w / 2) * sx, (cy + h / 2) * sy, angle)

    @classmethod
    def from_pixels(cls, x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> Box:
        """Box of an upright rectangle in pixels, written as the training files do: angle 90, sides exchanged."""
        return cls.from_polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], width, height)

    @classmethod
    def parse(cls, text: str) -> Box:
        """The only box in `text`; ValueError when there is none or more than one."""
        boxes = parse_boxes(text)
        if len(boxes) != 1:
            raise ValueError(
                f"expected one box {{<x1><y1><x2><y2>|<angle>}}, found {len(boxes)} in {text!r:.80}"
            )
        return boxes[0]

    def format(self) -> str:
        """The text form, rounded to whole percent and degrees; parsing it gives these numbers back."""
        corners = "".join(f"<{round(value)}>" for value in (self.x1, self.y1, self.x2, self.y2))
        return f"{{{corners}|<{round(self.angle)}>}}"

    def envelope(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Upright rectangle around the polygon in pixels: left, top, right, bottom."""
        polygon = self.polygon(width, height)
        (left, top), (right, bottom) = polygon.min(axis=0), polygon.max(axis=0)
        return float(left), float(top), float(right), float(bottom)

    def to_square(self, width: int, height: int) -> Box:
        """The same pixels in percent of the image padded to a square, as the vision tower sees it."""
        side, left, top = _padding(width, height)
        sx, sy, ox, oy = width / side, height / side, 100 * left / side, 100 * top / side
        return Box(self.x1 * sx + ox, self.y1 * sy + oy, self.x2 * sx + ox, self.y2 * sy + oy, self.angle)

    def from_square(self, width: int, height: int) -> Box:
        """Inverse of `to_square`: from percent of the padded square to percent of the original image."""
        side, left, top = _padding(width, height)
        sx, sy, ox, oy = side / width, side / height, 100 * left / width, 100 * top / height
        return Box(self.x1 * sx - ox, self.y1 * sy - oy, self.x2 * sx - ox, self.y2 * sy - oy, self.angle)

    def iou(
        self, other: Box, width: float, height: float, mode: Literal["rotated", "hbb"] = "rotated"
    ) -> float:
        """Intersection over union in an image `width` by `height`.

        "rotated" compares the oriented rectangles, "hbb" the upright rectangles around them.
        """
        return polygon_iou(self.polygon(width, height), other.polygon(width, height), mode)


@dataclass(frozen=True, slots=True)
class Region:
    """A phrase of an answer and the boxes that follow it; either may be empty."""

    phrase: str
    boxes: list[Box] = field(default_factory=list)


def parse_boxes(text: str) -> list[Box]:
    """All boxes in `text`, in order; never raises. A box without an angle has angle 0."""
    return [_box(match.groups()[:5]) for match in BOX_PATTERN.finditer(text)]


def parse_regions(text: str) -> list[Region]:
    """Phrases with their boxes, in order: `<p> two ships </p> {..}<delim>{..}` is one region of two boxes.

    Boxes that follow no phrase, as in the answer to `[refer]`, form a region with an empty phrase.
    """
    regions: list[Region] = []
    for match, number in region_items(text):
        if number == len(regions):
            regions.append(Region(" ".join((match["phrase"] or "").split())))
        if match["box"] is not None:
            regions[number].boxes.append(_box(match.groups()[2:7]))
    return regions


def region_items(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Phrases and boxes in their order, each with the number of its region in `parse_regions`. A phrase's text is in the
    match's group "phrase", a box's in "box"."""
    number, end = -1, 0
    for match in _ITEM.finditer(text):
        joined = (
            match["box"] is not None and number >= 0 and _BETWEEN_BOXES.fullmatch(text, end, match.start())
        )
        number += 0 if joined else 1
        end = match.end()
        yield match, number


def without_boxes(text: str) -> str:
    """The answer as prose: boxes and tags removed, spaces tidied."""
    prose = re.sub(rf"</?p>|{re.escape(DELIMITER)}", " ", BOX_PATTERN.sub(" ", text))
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(prose.split()))


def box_faults(text: str) -> list[str]:
    """What in `text` is not a box in `GRAMMAR`, or is one that no labelling can have meant; empty when all is well."""
    faults = []
    for start in re.finditer(r"\{\s*<", text):
        exact = GRAMMAR.match(text, start.start())
        shown = repr(text[start.start() : start.start() + 40])
        if exact is None:
            faults.append(f"box out of grammar: {shown}")
            continue
        x1, y1, x2, y2, angle = (int(value) for value in exact.groups())
        shown = repr(exact.group())
        if angle > 90:
            faults.append(f"angle above 90: {shown}")
        if x2 < x1 or y2 < y1:
            faults.append(f"corners exchanged: {shown}")
        # Unclipped labels of GeoChat-Bench reach from -33 to 147 percent; its training file also holds 981.
        if min(x1, y1, x2, y2) < -100 or max(x1, y1, x2, y2) > 200:
            faults.append(f"coordinate far outside the image: {shown}")
    return faults


def polygon_iou(a: Any, b: Any, mode: Literal["rotated", "hbb"] = "rotated") -> float:
    """Exact intersection over union of two polygons [n, 2], in [0, 1].

    A polygon is its convex hull, so the order of its points does not matter. One without area, or with a
    coordinate that is not finite, overlaps nothing: 0, never an exception.
    """
    return overlap(_outline(a, mode), _outline(b, mode))


def iou_matrix(
    first: Sequence[Any], second: Sequence[Any], mode: Literal["rotated", "hbb"] = "rotated"
) -> np.ndarray:
    """`polygon_iou` of every pair, float64 [len(first), len(second)]."""
    rows, columns = [_outline(p, mode) for p in first], [_outline(p, mode) for p in second]
    values = [overlap(row, column) for row in rows for column in columns]
    return np.array(values, dtype=np.float64).reshape(len(rows), len(columns))


def to_geojson(
    regions: Sequence[Region], width: int, height: int, transform: Sequence[float] | None = None
) -> dict[str, Any]:
    """A GeoJSON FeatureCollection with one polygon per box and the phrase as a property.

    Args:
        transform: (a, b, c, d, e, f) from pixels to a map, x = a·column + b·row + c and y = d·column + e·row + f
            (rasterio's order). Without it the coordinates are pixels, y down.
    """
    a, b, c, d, e, f = transform or (1, 0, 0, 0, 1, 0)
    features = []
    for number, region in enumerate(regions):
        for box in region.boxes:
            points = [(a * x + b * y + c, d * x + e * y + f) for x, y in box.polygon(width, height).tolist()]
            properties = {"phrase": region.phrase, "region": number, "box": box.format()}
            features.append(polygon_feature(points, properties))
    return feature_collection(features)


def _box(groups: Sequence[str | None]) -> Box:
    x1, y1, x2, y2, angle = (float(value) if value is not None else 0.0 for value in groups)
    return Box(x1, y1, x2, y2, angle)


def _outline(polygon: Any, mode: str) -> list[tuple[float, float]]:
    if mode not in ("rotated", "hbb"):
        raise ValueError(f'mode must be "rotated" or "hbb", found {mode!r}')
    points = [(float(x), float(y)) for x, y in polygon]
    if not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        return []
    if mode == "hbb" and points:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        points = [(min(xs), min(ys)), (max(xs), min(ys)), (max(xs), max(ys)), (min(xs), max(ys))]
    return convex_hull(points)


def _check_size(width: float, height: float) -> None:
    if not (width > 0 and height > 0):
        raise ValueError(f"an image needs a positive width and height, found {width} x {height}")


def _padding(width: int, height: int) -> tuple[int, int, int]:
    """Side of the padded square, and the columns and rows before the image; an odd remainder goes behind it."""
    _check_size(width, height)
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2
