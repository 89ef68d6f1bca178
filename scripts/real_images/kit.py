"""KIT AIS vehicles as this example reads them: tiles, the split by frame, windows with their boxes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geochat.data.boxes import Box

Corners = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of a window as it is stored."""

WINDOW = 160
"""Side of a test window in pixels of the tile: a car is then about two patches of the nano tower long at 126 px."""

SEEN_TEST, GAP = 0.15, 2
"""Share of a training street's frames, its last ones, that are kept for testing; frames dropped before them."""


@dataclass(frozen=True)
class KitTile:
    file: str
    """`MOS155_320_110.jpg`: frame, and the tile's left and top in it."""
    size: tuple[int, int]
    boxes: tuple[Corners, ...]

    @property
    def frame(self) -> str:
        return self.file.split("_")[0]

    @property
    def corner(self) -> tuple[int, int]:
        left, top = self.file.removesuffix(".jpg").split("_")[1:]
        return int(left), int(top)


@dataclass(frozen=True)
class Window:
    """A square of a tile, stored turned by `way` (see `turned` in prepare.py); boxes in reading order."""

    tile: KitTile
    left: int
    top: int
    side: int
    way: int
    boxes: tuple[Corners, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def to_box(self, corners: Corners) -> Box:
        return Box.from_pixels(*corners, *self.size)

    def phrase(self) -> str:
        return "vehicle" if len(self.boxes) == 1 else f"{len(self.boxes)} vehicles"

    def clear_places(self) -> list[tuple[str, Corners]]:
        """Vehicles that are alone in their ninth of the window, with the name of that ninth."""
        names = [place_name((b[0] + b[2]) / 2 / self.side, (b[1] + b[3]) / 2 / self.side) for b in self.boxes]
        return [(name, box) for name, box in zip(names, self.boxes, strict=True) if names.count(name) == 1]


def place_name(x: float, y: float) -> str:
    row = ("top", "", "bottom")[min(2, int(y * 3))]
    column = ("left", "", "right")[min(2, int(x * 3))]
    return " ".join(word for word in (row, column) if word) or "center"


def read_tiles(data: Path) -> list[KitTile]:
    """Raises: ValueError when the listing is absent or malformed."""
    listing = data / "kit_cars.json"
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file; name the folder that holds kit_cars.json and kit_cars/")
    try:
        return [
            KitTile(item["image"], tuple(item["size"]), tuple(tuple(box[1:5]) for box in item["boxes"]))
            for item in json.loads(listing.read_text(encoding="utf-8"))["items"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{listing}: {error!r}") from None


def split_tiles(tiles: list[KitTile]) -> tuple[list[KitTile], dict[str, list[KitTile]]]:
    """(training tiles, {"seen": …, "unseen": …}), by frame.

    Of three streets the one with the fewest tiles (MOS74 … MOS93) is never trained on; every fourth of its frames is
    asked about, since neighbours are near-duplicates. Of the others the last frames are kept for testing.
    """
    streets: dict[str, list[str]] = {}
    for frame in sorted({tile.frame for tile in tiles}, key=frame_number):
        streets.setdefault(street_of(frame), []).append(frame)
    unseen = min(streets, key=lambda name: sum(street_of(tile.frame) == name for tile in tiles))
    train: set[str] = set()
    asked: dict[str, set[str]] = {"seen": set(), "unseen": set(streets.pop(unseen)[::4])}
    for frames in streets.values():
        kept = max(1, round(SEEN_TEST * len(frames)))
        asked["seen"] |= set(frames[-kept:])
        train |= set(frames[: -kept - GAP])
    chosen = {place: [tile for tile in tiles if tile.frame in frames] for place, frames in asked.items()}
    return [tile for tile in tiles if tile.frame in train], chosen


def frame_number(frame: str) -> int:
    match = re.search(r"(\d+)$", frame)
    if match is None:
        raise ValueError(f"{frame}: a frame's name must end in its number")
    return int(match[1])


def street_of(frame: str) -> str:
    """Frames are numbered through one flight: MOS74 … and MOS155 … are two streets, MunichStreet02-… is a third."""
    number = frame_number(frame)
    return f"{frame.removesuffix(str(number))}{'late' if number >= 100 else 'early'}"


def test_windows(tiles: list[KitTile]) -> Iterator[Window]:
    """Four windows of each tile that hold a vehicle. Tiles that repeat more than a third of another are left out."""
    kept: list[KitTile] = []
    for tile in tiles:
        if all(_shared(tile, other) <= 1 / 3 for other in kept if other.frame == tile.frame):
            kept.append(tile)
    for tile in kept:
        for top in range(0, tile.size[1] - WINDOW + 1, WINDOW):
            for left in range(0, tile.size[0] - WINDOW + 1, WINDOW):
                window = cut(tile, left, top, WINDOW, 0)
                if window.boxes:
                    yield window


def augmented_windows(tiles: list[KitTile], count: int, rng: np.random.Generator) -> Iterator[Window]:
    """Random windows of 120 to 200 px with at least one vehicle and at most eight, turned at random."""
    found = 0
    for _ in range(count * 50):
        if found == count:
            return
        tile = tiles[int(rng.integers(len(tiles)))]
        side = int(rng.integers(120, 201))
        left, top = (int(rng.integers(edge - side + 1)) for edge in tile.size)
        window = cut(tile, left, top, side, int(rng.integers(8)))
        if 1 <= len(window.boxes) <= 8:
            found += 1
            yield window
    raise ValueError(f"only {found} of {count} windows hold a vehicle")


def cut(tile: KitTile, left: int, top: int, side: int, way: int) -> Window:
    """The window with the vehicles of which at least half is inside, cut off at its edges."""
    boxes: list[Corners] = []
    for x1, y1, x2, y2 in tile.boxes:
        inner = max(x1, left), max(y1, top), min(x2, left + side), min(y2, top + side)
        area = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
        if area >= 0.5 * (x2 - x1) * (y2 - y1) > 0:
            moved = (inner[0] - left, inner[1] - top, inner[2] - left, inner[3] - top)
            boxes.append(turn_corners(moved, side, way))
    boxes.sort(key=lambda box: (round((box[1] + box[3]) / 2 / side, 1), box[0] + box[2]))
    return Window(tile, left, top, side, way, tuple(boxes))


def turn_corners(corners: Corners, side: int, way: int) -> Corners:
    """What `turned` does to a picture, done to a box."""
    x1, y1, x2, y2 = corners
    if way >= 4:
        x1, x2 = side - x2, side - x1
    for _ in range(way % 4):  # a quarter turn clockwise
        x1, y1, x2, y2 = side - y2, x1, side - y1, x2
    return x1, y1, x2, y2


def _shared(tile: KitTile, other: KitTile) -> float:
    """Share of a tile that another one of the same frame shows too."""
    (ax, ay), (bx, by), (w, h) = tile.corner, other.corner, tile.size
    return max(0, w - abs(ax - bx)) * max(0, h - abs(ay - by)) / (w * h)
