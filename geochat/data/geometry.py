"""Plane geometry of convex polygons: hull, smallest rectangle, overlap. Plain Python: faster than numpy on four points.

Points are (x, y) pairs; y points down, as on a screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

Point = tuple[float, float]


def convex_hull(points: Iterable[Sequence[float]]) -> list[Point]:
    """Corners of the hull, each once, with positive shoelace area (clockwise on screen); fewer than 3 if flat."""
    ordered = sorted({(float(x), float(y)) for x, y in points})
    if len(ordered) < 3:
        return ordered
    lower, upper = _chain(ordered), _chain(reversed(ordered))
    return lower[:-1] + upper[:-1]


def _chain(points: Iterable[Point]) -> list[Point]:
    """One half of Andrew's monotone chain."""
    chain: list[Point] = []
    for x, y in points:
        while len(chain) > 1:
            (ax, ay), (bx, by) = chain[-2], chain[-1]
            if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                break
            chain.pop()
        chain.append((x, y))
    return chain


def area(polygon: Sequence[Point]) -> float:
    """Shoelace area, positive for a hull of `convex_hull` and negative for the same points in reverse."""
    if len(polygon) < 3:
        return 0.0
    # Relative to a corner: far from the origin the products would swallow the digits of a small polygon.
    x0, y0 = polygon[0]
    total = 0.0
    for (ax, ay), (bx, by) in pairwise(polygon[1:]):
        total += (ax - x0) * (by - y0) - (bx - x0) * (ay - y0)
    return total / 2


def clip(subject: Sequence[Point], window: Sequence[Point]) -> list[Point]:
    """The part of convex `subject` inside convex `window` (Sutherland and Hodgman 1974); both from `convex_hull`."""
    kept = list(subject)
    ax, ay = window[-1]
    for bx, by in window:
        dx, dy = bx - ax, by - ay
        # Signed distance to the edge's line, times the edge's length: >= 0 is inside.
        side = [dx * (y - ay) - dy * (x - ax) for x, y in kept]
        result: list[Point] = []
        for i, (x, y) in enumerate(kept):
            (px, py), before, here = kept[i - 1], side[i - 1], side[i]
            if (before > 0 > here) or (before < 0 < here):
                t = before / (before - here)
                result.append((px + t * (x - px), py + t * (y - py)))
            if here >= 0:
                result.append((x, y))
        kept = result
        if not kept:
            return []
        ax, ay = bx, by
    return kept


def overlap(a: Sequence[Point], b: Sequence[Point]) -> float:
    """Intersection over union of two hulls, in [0, 1]; 0 when either has no area."""
    if not _envelopes_meet(a, b):
        return 0.0
    first, second = area(a), area(b)
    if first <= 0 or second <= 0:
        return 0.0
    shared = max(0.0, area(clip(a, b)))
    union = first + second - shared
    return min(1.0, shared / union) if union > 0 else 0.0


def _envelopes_meet(a: Sequence[Point], b: Sequence[Point]) -> bool:
    return bool(a and b) and all(
        min(p[axis] for p in a) < max(p[axis] for p in b)
        and min(p[axis] for p in b) < max(p[axis] for p in a)
        for axis in (0, 1)
    )


def smallest_rectangle(points: Iterable[Sequence[float]]) -> tuple[float, float, float, float, float]:
    """Rectangle of least area around the points, as OpenCV >= 4.5.1 `minAreaRect` states it.

    Returns centre x, centre y, width, height, angle: the width runs along (cos angle, sin angle) with y down, and
    the angle is in (0, 90] degrees, so that an upright rectangle has angle 90 and its height as "width".
    One side of the answer always lies on an edge of the hull (Freeman and Shapira 1975).
    """
    hull = convex_hull(points)
    if not hull:
        raise ValueError("a rectangle needs at least one point")
    best = (math.inf, 0.0, 0.0, 0.0, 0.0, 90.0)
    for (ax, ay), (bx, by) in zip(hull[-1:] + hull[:-1], hull, strict=True):
        angle = math.degrees(math.atan2(by - ay, bx - ax)) % 90.0 or 90.0
        if angle < 1e-9 or angle > 90.0 - 1e-9:
            angle = 90.0
        # Exact on upright edges, where cos(90 degrees) would leave 6e-17.
        cos, sin = (
            (0.0, 1.0) if angle == 90.0 else (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
        )
        along = [x * cos + y * sin for x, y in hull]
        across = [y * cos - x * sin for x, y in hull]
        width, height = max(along) - min(along), max(across) - min(across)
        u, v = (max(along) + min(along)) / 2, (max(across) + min(across)) / 2
        candidate = (width * height, u * cos - v * sin, u * sin + v * cos, width, height, angle)
        # Edges of one rectangle give the same area but for rounding: the first of equals stays.
        if candidate[0] < best[0] * (1 - 1e-9):
            best = candidate
    return best[1:]
