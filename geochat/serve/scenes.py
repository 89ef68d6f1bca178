"""One question on every tile of a large scene, and the objects of the whole scene out of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.data.boxes import Box, Region
from geochat.data.draw import draw_regions
from geochat.data.geojson import feature_collection, polygon_feature
from geochat.data.rows import Row
from geochat.data.staged import staged
from geochat.data.tiles import Detection, Tile, detections, merge, tile_scene
from geochat.serve.batch import Item, ask_all, box_rows
from geochat.serve.pictures import save_picture
from geochat.serve.raster import Crs, Scene, open_scene

GEOJSON, OVERVIEW = "boxes.geojson", "overview.png"
_LABELS = 25  # more would cover the overview


@dataclass(frozen=True)
class Found:
    """What a scene was found to hold."""

    objects: list[Detection]
    tiles: int
    failures: int
    georeferenced: bool
    limits: np.ndarray | None
    """See `Scene.limits`."""


def detect(
    chat: Chat | RemoteChat,
    path: Path,
    query: str,
    output: Path,
    *,
    side: int,
    overlap: float,
    crs: Crs,
    settings: Row,
    decoding: dict[str, Any],
) -> Found:
    """Ask about every tile; `output` gets answers.jsonl (a row per tile), boxes.geojson and overview.png.

    Tiles are squares of `side` pixels whose neighbours share `overlap` of their side. Raises ValueError.
    """
    with open_scene(path) as scene:

        def found(tile: Tile, text: str) -> list[Detection]:
            return detections(text, tile, scene.width, scene.height)

        def boxes(tile: Tile, text: str) -> Row:
            return {"boxes": box_rows(found(tile, text))}

        tiles = tile_scene(scene.width, scene.height, side, overlap)
        items = [Item(tile.name, partial(scene.read, tile), partial(boxes, tile)) for tile in tiles]
        rows = ask_all(chat, items, query, output, {"scene": str(path), **settings}, decoding)
        failures = sum(row["error"] is not None for row in rows)
        answered = [(tile, row["text"]) for tile, row in zip(tiles, rows, strict=True) if row["text"]]
        objects = merge(one for tile, text in answered for one in found(tile, text))
        collection = as_geojson(scene, objects, crs)
        with staged(output / GEOJSON) as temporary:
            temporary.write_text(json.dumps(collection, ensure_ascii=False) + "\n", encoding="utf-8")
        save_picture(draw_overview(scene, objects), output / OVERVIEW)
        georeferenced = scene.coordinates(np.zeros((1, 2)), crs) is not None
        return Found(objects, len(tiles), failures, georeferenced, scene.limits)


def as_geojson(scene: Scene, objects: Sequence[Detection], crs: Crs) -> dict[str, Any]:
    """A polygon for each object, with its phrase and its corners in pixels of the scene.

    Longitude and latitude for "wgs84", the file's own system for "native", pixels where the file has no georeference.
    """
    features = []
    for one in objects:
        placed = scene.coordinates(one.polygon, crs)
        properties = {"phrase": one.phrase, "pixels": one.polygon.round(2).tolist()}
        features.append(polygon_feature((one.polygon if placed is None else placed).tolist(), properties))
    collection = feature_collection(features)
    if crs == "native" and scene.crs_name:
        # RFC 7946 knows longitude and latitude alone; this member is its predecessor's, which GIS programs read.
        collection["crs"] = {"type": "name", "properties": {"name": scene.crs_name}}
    return collection


def draw_overview(scene: Scene, objects: Sequence[Detection]) -> Image.Image:
    """The scene, reduced, with the objects: a colour for each kind, names where there are few."""
    kinds: dict[str, list[Box]] = {}
    for one in objects:
        box = Box.from_polygon(one.polygon, scene.width, scene.height)
        kinds.setdefault(one.kind, []).append(box)
    regions = [Region(kind if len(objects) <= _LABELS else "", boxes) for kind, boxes in kinds.items()]
    return draw_regions(scene.overview(), regions)
