"""Polygons as GeoJSON (RFC 7946)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from geochat.data.geometry import area


def polygon_feature(points: Iterable[Sequence[float]], properties: dict[str, Any]) -> dict[str, Any]:
    """A Feature with one closed ring, counter-clockwise in the coordinates it is given in.

    `points` are the corners in order, each once, in the coordinates of the file: longitude and latitude for RFC 7946.
    """
    ring = [(float(x), float(y)) for x, y in points]
    if area(ring) < 0:
        ring.reverse()
    coordinates = [list(point) for point in [*ring, ring[0]]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [coordinates]},
        "properties": properties,
    }


def feature_collection(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": features}
