"""What the web demo shows, as pure functions: of answers, boxes that are being drawn, and shortcuts to the tasks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

from PIL import Image

from geochat.data.boxes import DELIMITER, Box, parse_regions, region_items, to_geojson
from geochat.data.draw import draw_regions
from geochat.data.phrases import DESCRIBE, SHORT, scene_prompt
from geochat.data.synthetic import SCENES

LONGEST_SIDE = 1600
"""Larger pictures are shown reduced to this many pixels; the one to download has its original size."""

COLOURS = 8
"""Colours before the first one comes back, as in `geochat.data.draw.colour`."""

TASKS = ("Describe", "Classify", "Question", "[refer]", "[grounding]", "[identify]")

_DESCRIPTION = "Describe the image in detail."
_CLASSIFY = scene_prompt(sorted(SCENES))


@dataclass(frozen=True)
class Draft:
    """A box that a user draws: up to two corners in percent of the picture, and its turn, in degrees clockwise."""

    corners: tuple[tuple[float, float], ...] = ()
    angle: float = 0.0

    def tap(self, x: float, y: float) -> Draft:
        """With one more corner; a third one, or one on a side of the first, begins a new box."""
        if len(self.corners) == 1 and min(abs(x - self.corners[0][0]), abs(y - self.corners[0][1])) >= 1:
            return replace(self, corners=(*self.corners, (x, y)))
        return replace(self, corners=((x, y),))

    def box(self, width: int, height: int) -> Box | None:
        """The box as training files write it, for a picture of this size; None while a corner is missing."""
        if len(self.corners) < 2:
            return None
        (x1, y1), (x2, y2) = self.corners
        drawn = Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), self.angle)
        return Box.from_polygon(drawn.polygon(width, height), width, height)

    def outline(self, width: int, height: int) -> list[Box]:
        """What to draw of it: the box, or a small one around the only corner."""
        if box := self.box(width, height):
            return [box]
        return [Box(x - 1, y - 1, x + 1, y + 1) for x, y in self.corners]


def shortcut(task: str, typed: str, box: Box | None = None) -> str:
    """The question of a task about what the user has typed: an object, a question, or nothing yet.

    Raises ValueError for a task about a box without a box.
    """
    phrase = re.search(r"<p>(.*?)</p>", typed)
    made = typed.startswith(("[", _DESCRIPTION, _CLASSIFY))  # by another shortcut
    subject = phrase[1].strip() if phrase else "" if made else typed.removesuffix(SHORT).strip()
    if task == "[identify]":
        if box is None:
            raise ValueError("draw a box first: tap two opposite corners on the picture")
        return f"[identify] What is the object present at {box.format()}"
    if task == "[refer]":
        return f"[refer] Give me the location of <p> {subject or 'the ship'} </p>"
    if task == "Question":
        return f"{subject or 'How many ships are there in the image?'}\n{SHORT}"
    return {"Describe": _DESCRIPTION, "Classify": _CLASSIFY, "[grounding]": DESCRIBE}[task]


def prose_pieces(answer: str) -> list[tuple[str, int | None]]:
    """The answer as prose, in pieces, each with the number of the region of `parse_regions` that it names, or None.

    The boxes of a phrase are left out; a box that follows no phrase is written out.
    """
    cut: list[tuple[str, int | None]] = []
    plain, end, phrase = "", 0, -1
    for match, number in region_items(answer):
        plain += answer[end : match.start()]
        end = match.end()
        if match["box"] is None:
            phrase = number
        if match["box"] is None or number != phrase:
            cut += [(plain, None), (match["phrase"] or match["box"] or "", number)]
            plain = ""
    pieces: list[tuple[str, int | None]] = []
    for piece, region in [*cut, (plain + answer[end:], None)]:
        piece = re.sub(rf"(?:\s|</?p>|{DELIMITER})+", " ", piece)
        piece = re.sub(r"\s+([.,;:!?])", r"\1", piece)
        if region is not None:
            piece = piece.strip()
        elif not pieces or pieces[-1][0].endswith(" "):
            piece = piece.lstrip()
        if piece:
            pieces.append((piece, region))
    return pieces


def coloured(answer: str) -> list[tuple[str, str | None]]:
    """Pieces of the answer's prose, each with the number of its colour ("1" to "8") or None."""
    pieces = prose_pieces(answer)
    return [(text, None if region is None else str(region % COLOURS + 1)) for text, region in pieces]


def readable(answer: str, arriving: bool = False) -> str:
    """The answer's prose. While it is `arriving`, a box or tag at its end that is not complete is held back."""
    answer = re.sub(r"(?:\{[^}]*|<[^>]*)$", "", answer) if arriving else answer
    return "".join(text for text, _ in prose_pieces(answer))


def reduced(image: Image.Image) -> Image.Image:
    """The picture itself, or a copy whose longer side has `LONGEST_SIDE` pixels."""
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)


def on_screen(image: Image.Image, answer: str, draft: Draft) -> Image.Image:
    """A reduced picture with the boxes of the answer, and the user's own dashed."""
    return draw_regions(image, parse_regions(answer), truth=draft.outline(*image.size))


def to_download(image: Image.Image, answer: str) -> Image.Image:
    """The picture in its original size with the boxes of the answer."""
    return draw_regions(image, parse_regions(answer), min_side=1)


def geojson(question: str, answer: str, width: int, height: int) -> str:
    """The boxes as a GeoJSON FeatureCollection in pixels; question, answer and the picture's size stand beside them."""
    about = {"question": question, "answer": answer, "width": width, "height": height}
    return json.dumps(to_geojson(parse_regions(answer), width, height) | about, ensure_ascii=False, indent=1)
