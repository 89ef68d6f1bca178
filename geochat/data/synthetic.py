"""Procedural aerial scenes with exact labels: the data set that needs no download.

Objects are drawn at twice their final size and reduced, on textured ground, with shadows, lighting and sensor noise. Every
object knows its class, colour, size and oriented box. `python -m geochat.data.synthetic_tasks` writes a whole data set:
pictures, an instruction file for training and a question file for evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from geochat.data.boxes import Box

LAND, WATER, PAVED = 0, 1, 2
_ZONES = 48  # cells along a side in which the ground is looked up
PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (236, 236, 232),
    "gray": (134, 137, 140),
    "black": (38, 38, 42),
    "red": (186, 44, 40),
    "blue": (42, 84, 178),
    "green": (44, 128, 70),
    "yellow": (222, 190, 52),
    "orange": (222, 122, 40),
}


@dataclass(frozen=True)
class Kind:
    """A class of objects: length range as a share of the picture's side, width ÷ length, where it stands, its colours."""

    length: tuple[float, float]
    aspect: float
    grounds: tuple[int, ...]
    colours: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "ship": Kind((0.17, 0.40), 0.32, (WATER,), ("white", "gray", "red", "blue", "orange")),
    "plane": Kind((0.18, 0.36), 0.92, (PAVED, LAND), ("white", "gray", "blue", "yellow")),
    "vehicle": Kind((0.11, 0.20), 0.50, (PAVED, LAND), ("white", "black", "red", "blue", "yellow")),
    "storage tank": Kind((0.13, 0.27), 1.0, (PAVED, LAND), ("white", "gray", "green", "orange")),
    "tennis court": Kind((0.22, 0.38), 0.52, (LAND, PAVED), ("green", "blue", "red", "orange")),
    "house": Kind((0.15, 0.28), 0.68, (LAND,), ("red", "gray", "white", "orange")),
    "pool": Kind((0.12, 0.22), 0.58, (LAND, PAVED), ("blue",)),
}

SCENES: dict[str, dict[str, tuple[int, int]]] = {
    "airport": {"plane": (1, 5), "vehicle": (0, 3), "storage tank": (0, 1)},
    "beach": {"ship": (0, 3), "vehicle": (0, 3), "pool": (0, 1)},
    "desert": {"vehicle": (0, 3), "storage tank": (0, 2), "plane": (0, 1)},
    "farmland": {"house": (0, 2), "vehicle": (0, 3), "storage tank": (0, 1), "pool": (0, 1)},
    "forest": {"house": (0, 2), "vehicle": (0, 2)},
    "harbour": {"ship": (1, 5), "vehicle": (0, 3), "storage tank": (0, 2)},
    "industrial area": {"storage tank": (1, 5), "vehicle": (0, 3), "house": (0, 2)},
    "parking lot": {"vehicle": (3, 8), "house": (0, 1), "tennis court": (0, 1)},
    "residential area": {"house": (2, 6), "vehicle": (0, 3), "pool": (0, 2), "tennis court": (0, 1)},
    "river": {"ship": (0, 3), "vehicle": (0, 2), "house": (0, 2)},
    "sports ground": {"tennis court": (1, 4), "vehicle": (0, 3), "pool": (0, 1)},
}
"""For every scene class, which objects may stand in it and how many (least, most)."""


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths and positions in shares of the picture's side; heading in degrees, clockwise on screen."""

    kind: str
    colour: str
    x: float
    y: float
    length: float
    width: float
    heading: float

    @property
    def size(self) -> str:
        """ "small", "large", or "" for the third in the middle, which no phrase calls either."""
        low, high = KINDS[self.kind].length
        share = (self.length - low) / (high - low)
        return "small" if share < 0.4 else "large" if share > 0.6 else ""

    def polygon(self) -> np.ndarray:
        """Corners [4, 2] in shares of the picture's side."""
        return self._turn(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (self.length / 2, self.width / 2))

    def _turn(self, points: np.ndarray) -> np.ndarray:
        angle = math.radians(self.heading)
        cos, sin = math.cos(angle), math.sin(angle)
        return points @ np.array([[cos, sin], [-sin, cos]]) + (self.x, self.y)

    def box(self) -> Box:
        """The oriented box in percent. A circle has no heading of its own: it takes the axis-aligned 90."""
        turns, angle = divmod(0.0 if self.length == self.width else self.heading % 180.0, 90.0)
        across = turns % 2 == 1
        if (
            angle == 0.0
        ):  # the convention's range is (0, 90]: an axis-aligned box is written as 90 with its sides swapped
            angle, across = 90.0, not across
        w, h = (self.width, self.length) if across else (self.length, self.width)
        x1, y1, x2, y2 = self.x - w / 2, self.y - h / 2, self.x + w / 2, self.y + h / 2
        return Box(100 * x1, 100 * y1, 100 * x2, 100 * y2, angle)


@dataclass
class Scene:
    name: str
    image: Image.Image
    objects: list[SceneObject] = field(default_factory=list)


def draw_scene(seed: int, side: int = 168, name: str | None = None) -> Scene:
    """Draw the scene that belongs to a seed: the same seed gives the same pixels and labels."""
    rng = np.random.default_rng(seed)
    name = name or str(rng.choice(list(SCENES)))
    canvas = _Canvas(rng, side)
    zones = canvas.ground(name)
    objects = _place(rng, name, zones)
    canvas.enlarge(2)  # objects are drawn finer than they are seen
    for item in objects:
        canvas.stand(item)
    return Scene(name, canvas.finish(side), objects)


def _place(rng: np.random.Generator, name: str, zones: np.ndarray) -> list[SceneObject]:
    """Choose the objects and put them where they may stand, without overlap. What finds no room is left out."""
    placed: list[SceneObject] = []
    common = float(rng.choice([0.0, rng.uniform(0, 180)]))  # half of the scenes are aligned with the picture
    tidy = rng.random() < 0.5
    crowd = rng.uniform(0.85, 1.0)
    for kind, (least, most) in sorted(SCENES[name].items(), key=lambda item: -KINDS[item[0]].length[1]):
        spec = KINDS[kind]
        for _ in range(int(rng.integers(least, most + 1))):
            for _attempt in range(60):
                length = float(rng.uniform(*spec.length)) * (crowd if most > 3 else 1.0)
                length = max(length, spec.length[0])
                heading = (common + float(rng.choice([0, 90]))) % 180 if tidy else float(rng.uniform(0, 180))
                x, y = (float(v) for v in rng.uniform(0.06, 0.94, 2))
                item = SceneObject(
                    kind, str(rng.choice(spec.colours)), x, y, length, length * spec.aspect, heading
                )
                if _fits(item, placed, zones):
                    placed.append(item)
                    break
    return sorted(placed, key=lambda item: (round(item.y, 1), item.x))


def _fits(item: SceneObject, placed: list[SceneObject], zones: np.ndarray) -> bool:
    corners = item.polygon()
    if corners.min() < 0.005 or corners.max() > 0.995:
        return False
    points = np.vstack([corners, (corners + np.roll(corners, 1, axis=0)) / 2, [[item.x, item.y]]])
    cells = (points * len(zones)).astype(int)
    if not np.isin(zones[cells[:, 1], cells[:, 0]], KINDS[item.kind].grounds).all():
        return False
    return not any(_overlap(item, other) for other in placed)


def _overlap(a: SceneObject, b: SceneObject, gap: float = 0.012) -> bool:
    """Separating axes of two rectangles, each grown by the gap."""
    offset = np.array([b.x - a.x, b.y - a.y])
    for heading in (a.heading, a.heading + 90, b.heading, b.heading + 90):
        axis = np.array([math.cos(math.radians(heading)), math.sin(math.radians(heading))])
        reach = 0.0
        for item in (a, b):
            turn = math.radians(item.heading - heading)
            reach += abs(math.cos(turn)) * item.length / 2 + abs(math.sin(turn)) * item.width / 2
        if abs(offset @ axis) > reach + gap:
            return False
    return True


class _Canvas:
    """The picture while it is being drawn: the ground at the final size, then the objects at a finer one."""

    def __init__(self, rng: np.random.Generator, side: int) -> None:
        self.rng, self.side = rng, side
        self.sun = math.radians(float(rng.uniform(0, 360)))
        self.image = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)

    def noise(self, *cells: int) -> np.ndarray:
        """Smooth noise [side, side] of unit strength: one octave per number of cells."""
        total = np.zeros((self.side, self.side), np.float32)
        for octave, count in enumerate(cells):
            grid = Image.fromarray(self.rng.standard_normal((count + 1, count + 1)).astype(np.float32))
            total += np.asarray(grid.resize((self.side, self.side), Image.Resampling.BICUBIC)) / (1 + octave)
        return total

    def paint(self, mask: np.ndarray | None, colour: tuple[int, ...], strength: float, *cells: int) -> None:
        """Fill a mask (or everything) with a colour, textured and a little different in every scene."""
        tint = np.asarray(colour, np.float32) + self.rng.normal(0, 9, 3) + self.rng.normal(0, 7)
        texture = tint.astype(np.float32) + strength * self.noise(*cells)[..., None]
        layer = Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8))
        self.image.paste(layer, None if mask is None else Image.fromarray((mask * 255).astype(np.uint8)))

    def ground(self, name: str) -> np.ndarray:
        """Draw the ground of a scene class. Returns the zones [48, 48] of LAND, WATER and PAVED."""
        rng, side = self.rng, self.side
        y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
        turn = float(rng.uniform(0, 2 * math.pi))
        along = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)
        across = (y - 0.5) * math.cos(turn) - (x - 0.5) * math.sin(turn)
        wave = 0.03 * self.noise(5)
        water = np.zeros((side, side), bool)
        paved = np.zeros((side, side), bool)
        green, sand, grey = (92, 118, 66), (206, 184, 140), (122, 122, 120)
        if name == "airport":
            self.paint(None, (112, 126, 82), 9, 8, 40)
            paved = (np.abs(across + rng.uniform(-0.1, 0.1)) < rng.uniform(0.28, 0.36)) | (
                np.abs(along) < 0.12
            )
            self.paint(paved, (128, 128, 128), 5, 10, 60)
            self.stripe(turn, float(rng.uniform(-0.1, 0.1)))
        elif name == "beach":
            level = along + wave + rng.uniform(-0.12, 0.12)
            water = level < -0.03
            self.paint(None, sand, 8, 6, 60)
            self.paint(water, (44, 112, 134), 8, 10, 50)
            self.paint((level >= -0.03) & (level < 0.0), (226, 230, 224), 8, 30)
        elif name == "desert":
            self.paint(None, (200, 168, 118), 13, 4, 12, 60)
            ripple = np.sin((along * rng.uniform(60, 110)) + 30 * wave) > 0.75
            self.paint(ripple, (182, 148, 100), 8, 30)
        elif name == "farmland":
            self.paint(None, green, 8, 6, 40)
            self.fields(turn)
        elif name == "forest":
            self.paint(None, (52, 82, 46), 9, 8, 50)
            self.trees(260, (34, 70, 34))
        elif name == "harbour":
            water = across + 0.2 * wave + rng.uniform(-0.02, 0.16) > -0.08
            self.paint(None, (148, 144, 138), 6, 10, 60)
            paved = ~water
            self.paint(water, (36, 66, 92), 7, 8, 50)
            self.paint(np.abs(across + 0.2 * wave + 0.08) < 0.01, (84, 82, 78), 4, 20)
        elif name == "industrial area":
            self.paint(None, (146, 138, 124), 8, 6, 60)
            paved = np.abs(across + rng.uniform(-0.2, 0.2)) < 0.1
            self.paint(paved, grey, 5, 50)
        elif name == "parking lot":
            self.paint(None, (92, 93, 96), 5, 8, 60)
            paved[:] = True
            self.bays(turn)
        elif name == "residential area":
            self.paint(None, (104, 128, 78), 9, 8, 50)
            paved = (np.abs(across + rng.uniform(-0.2, 0.2)) < 0.06) | (
                np.abs(along + rng.uniform(-0.3, 0.3)) < 0.05
            )
            self.paint(paved, (112, 112, 112), 4, 40)
            self.trees(30, (48, 88, 44))
        elif name == "river":
            self.paint(None, (88, 110, 62), 10, 6, 50)
            water = np.abs(across + 1.6 * wave) < rng.uniform(0.16, 0.24)
            self.paint(water, (74, 98, 92), 6, 8, 40)
            self.trees(50, (44, 78, 40), keep=~water)
        else:  # sports ground
            self.paint(None, (78, 148, 74), 6, 6, 50)
            mown = (np.sin(along * rng.uniform(50, 80)) > 0) & (np.abs(across) < 0.4)
            self.paint(mown, (96, 164, 84), 5, 40)
        zones = np.where(water, WATER, np.where(paved, PAVED, LAND)).astype(np.uint8)
        cells = ((np.arange(_ZONES) + 0.5) * side / _ZONES).astype(int)
        return zones[np.ix_(cells, cells)]

    def stripe(self, turn: float, offset: float) -> None:
        """The dashed centre line of a runway."""
        for start in np.arange(-0.7, 0.7, 0.08):
            ends = [(start, -offset), (start + 0.045, -offset)]
            points = [
                (
                    self.side * (0.5 + a * math.cos(turn) - b * math.sin(turn)),
                    self.side * (0.5 + a * math.sin(turn) + b * math.cos(turn)),
                )
                for a, b in ends
            ]
            self.draw.line([*points[0], *points[1]], fill=(222, 222, 218), width=max(1, self.side // 100))

    def fields(self, turn: float) -> None:
        """Strips of crops, each with its own colour and furrows."""
        y, x = np.mgrid[0 : self.side, 0 : self.side].astype(np.float32) / self.side
        u = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)
        v = (y - 0.5) * math.cos(turn) - (x - 0.5) * math.sin(turn)
        edges = np.sort(self.rng.uniform(-0.6, 0.6, 4))
        crops = ((126, 142, 66), (168, 154, 84), (84, 116, 58), (142, 112, 76), (104, 134, 84))
        for index, crop in enumerate(self.rng.permutation(crops)):
            low = edges[index - 1] if index else -1.0
            high = edges[index] if index < 4 else 1.0
            mask = (u >= low) & (u < high)
            self.paint(mask, tuple(int(c) for c in crop), 7, 8, 60)
            furrow = mask & (np.sin(v * self.rng.uniform(120, 200)) > 0.6)
            self.paint(furrow, tuple(int(c * 0.88) for c in crop), 5, 40)

    def trees(self, count: int, colour: tuple[int, int, int], keep: np.ndarray | None = None) -> None:
        for _ in range(count):
            x, y = (int(v) for v in self.rng.integers(0, self.side, 2))
            if keep is not None and not keep[y, x]:
                continue
            radius = float(self.rng.uniform(0.008, 0.024)) * self.side
            shade = self.rng.normal(0, 10)
            for grow, light in ((1.0, -16), (0.7, 8)):
                tone = tuple(int(np.clip(c + light + shade, 0, 255)) for c in colour)
                r = radius * grow
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=tone)

    def bays(self, turn: float) -> None:
        """The painted lines of a parking lot."""
        step, width = 0.11, 1
        for a in np.arange(-0.75, 0.75, step):
            for b in (-0.45, -0.05, 0.35):
                ends = [(a, b), (a, b + 0.2)]
                flat = [
                    self.side * (0.5 + u * c - v * s) if even else self.side * (0.5 + u * s + v * c)
                    for u, v in ends
                    for even, c, s in (
                        (True, math.cos(turn), math.sin(turn)),
                        (False, math.cos(turn), math.sin(turn)),
                    )
                ]
                self.draw.line(flat, fill=(196, 196, 190), width=width)

    def enlarge(self, factor: int) -> None:
        self.side *= factor
        self.image = self.image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        self.draw = ImageDraw.Draw(self.image)

    # ---- objects -----------------------------------------------------------------------------------------------

    def shape(
        self,
        item: SceneObject,
        points: list[tuple[float, float]],
        colour: tuple[int, ...],
        shift: float = 0.0,
    ) -> None:
        """A polygon given in the object's own frame: x along its length, y across, both from −1 to 1."""
        at = item._turn(np.asarray(points, float) * (item.length / 2, item.width / 2)) * self.side
        at = at + shift * self.side * np.array([math.cos(self.sun), math.sin(self.sun)])
        self.draw.polygon([tuple(p) for p in at], fill=tuple(int(np.clip(c, 0, 255)) for c in colour))

    def stand(self, item: SceneObject) -> None:
        """Draw one object with its shadow."""
        base = np.asarray(PALETTE[item.colour], float) + self.rng.normal(0, 7, 3)
        parts = _PARTS[item.kind]
        outline = parts[0][0]
        height = 0.0 if item.kind in ("tennis court", "pool") else 0.012
        if height:
            self.shape(item, outline, (34, 36, 40), height)
        for points, tone in parts:
            colour = base * tone if isinstance(tone, float) else np.asarray(tone, float)
            self.shape(item, points, tuple(colour))
        if item.kind == "storage tank":  # the wall facing away from the sun is darker
            self.shape(item, [(0.55 * u, 0.55 * v) for u, v in _circle()], tuple(base * 0.93), -0.008)

    def finish(self, side: int) -> Image.Image:
        """Uneven light, haze, blur, reduction to the final size and sensor noise."""
        rng = self.rng
        small = self.image.resize((side, side), Image.Resampling.BOX)
        pixels = np.asarray(small.filter(ImageFilter.BoxBlur(float(rng.uniform(0, 0.6)))), np.float32)
        y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side - 0.5
        slope = rng.normal(0, 0.09, 2)
        light = 1 + slope[0] * x + slope[1] * y + rng.normal(0, 0.07)
        contrast = rng.uniform(0.85, 1.12)
        pixels = (pixels * light[..., None] - 118) * contrast + 118 + rng.normal(0, 3.5, 3)
        pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(1.5, 5.0))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _circle(corners: int = 22) -> list[tuple[float, float]]:
    return [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, corners, endpoint=False)]


def _rect(x1: float, y1: float, x2: float, y2: float) -> list[tuple[float, float]]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


_LINE = (232, 232, 226)
_GLASS = (52, 60, 70)
_PARTS: dict[str, list[tuple[list[tuple[float, float]], float | tuple[int, int, int]]]] = {
    "ship": [
        ([(-1, -0.8), (-0.9, -1), (0.45, -1), (1, 0), (0.45, 1), (-0.9, 1), (-1, 0.8)], 1.0),
        ([(-0.85, -0.65), (0.4, -0.65), (0.75, 0), (0.4, 0.65), (-0.85, 0.65)], 0.78),
        (_rect(-0.75, -0.5, -0.35, 0.5), (224, 224, 220)),
        (_rect(-0.1, -0.35, 0.25, 0.35), 1.12),
    ],
    "plane": [
        (
            [
                (1, 0),
                (0.85, 0.09),
                (0.3, 0.12),
                (-0.2, 1),
                (-0.42, 1),
                (-0.15, 0.12),
                (-0.75, 0.09),
                (-0.92, 0.38),
                (-1, 0.38),
                (-0.93, 0),
                (-1, -0.38),
                (-0.92, -0.38),
                (-0.75, -0.09),
                (-0.15, -0.12),
                (-0.42, -1),
                (-0.2, -1),
                (0.3, -0.12),
                (0.85, -0.09),
            ],
            1.0,
        ),
        ([(0.95, 0), (0.8, 0.05), (-0.9, 0.03), (-0.9, -0.03), (0.8, -0.05)], 0.86),
        (_rect(0.72, -0.07, 0.84, 0.07), _GLASS),
    ],
    "vehicle": [
        ([(-1, -0.8), (-0.85, -1), (0.8, -1), (1, -0.7), (1, 0.7), (0.8, 1), (-0.85, 1), (-1, 0.8)], 1.0),
        (_rect(0.2, -0.8, 0.5, 0.8), _GLASS),
        (_rect(-0.75, -0.75, -0.55, 0.75), _GLASS),
        (_rect(-0.5, -0.7, 0.15, 0.7), 1.1),
    ],
    "storage tank": [(_circle(), 0.72), ([(0.9 * u, 0.9 * v) for u, v in _circle()], 1.0)],
    "tennis court": [
        (_rect(-1, -1, 1, 1), 0.8),
        (_rect(-0.8, -0.7, 0.8, 0.7), _LINE),
        (_rect(-0.74, -0.6, 0.74, 0.6), 1.05),
        (_rect(-0.04, -0.85, 0.04, 0.85), _LINE),
        (_rect(-0.4, -0.6, -0.35, 0.6), _LINE),
        (_rect(0.35, -0.6, 0.4, 0.6), _LINE),
    ],
    "house": [
        (_rect(-1, -1, 1, 1), 1.0),
        (_rect(-1, 0, 1, 1), 0.7),
        (_rect(-1, -0.06, 1, 0.06), 0.5),
        (_rect(0.4, -0.7, 0.62, -0.35), (92, 76, 70)),
    ],
    "pool": [
        (_rect(-1, -1, 1, 1), (214, 206, 190)),
        (
            [
                (-0.8, -0.5),
                (-0.6, -0.74),
                (0.6, -0.74),
                (0.8, -0.5),
                (0.8, 0.5),
                (0.6, 0.74),
                (-0.6, 0.74),
                (-0.8, 0.5),
            ],
            (64, 176, 206),
        ),
        (_rect(-0.5, -0.4, 0.3, -0.2), (112, 204, 222)),
    ],
}  # outline first (it also casts the shadow), then what lies on it; a number scales the object's own colour
