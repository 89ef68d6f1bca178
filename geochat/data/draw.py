"""Boxes and phrases on a picture, with Pillow only: the command line, reports and validation draw alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

from geochat.data.boxes import Box, Region

Colour = tuple[int, int, int]

# Hues far apart from each other and from vegetation, soil and water; the first ones are the most distinct.
_PALETTE = ("#ffd60a", "#ff2d95", "#00e5ff", "#ff7a00", "#b388ff", "#7cff4f", "#ff5252", "#4f8cff")
TRUTH: Colour = (255, 255, 255)
"""True boxes are drawn in white, dashed."""

LONGEST_ENLARGED = 4096
"""No picture is enlarged beyond this longer side: a strip of 2 x 30,000 pixels must not become gigabytes."""


def colour(number: int) -> Colour:
    """Colour of the `number`-th region; repeats after eight."""
    return ImageColor.getrgb(_PALETTE[number % len(_PALETTE)])[:3]


def draw_regions(
    image: Image.Image,
    regions: Sequence[Region | Box],
    labels: Sequence[str] | None = None,
    truth: Sequence[Region | Box] | None = None,
    min_side: int = 512,
) -> Image.Image:
    """A copy of the picture with the boxes and their phrases.

    Args:
        image: any mode; the result is RGB.
        regions: regions (one colour each, the phrase as label) or single boxes.
        labels: replaces the phrases, one for each entry of `regions`.
        truth: true regions or boxes, dashed in white beneath the others.
        min_side: a much smaller picture is enlarged by a whole factor to about this shorter side first, so that labels
            stay readable.
    """
    canvas = image.convert("RGB")
    scale = max(1, min(round(min_side / min(canvas.size)), LONGEST_ENLARGED // max(canvas.size)))
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.LANCZOS)
    stroke = max(2, round(min(canvas.size) / 220))
    font = _font(max(12, round(min(canvas.size) / 34)))
    named = [_region(entry) for entry in regions]
    if labels is not None:
        if len(labels) != len(named):
            raise ValueError(f"{len(labels)} labels for {len(named)} regions")
        named = [Region(label, region.boxes) for label, region in zip(labels, named, strict=True)]

    pen = ImageDraw.Draw(canvas, "RGBA")
    for region in map(_region, truth or ()):
        for box in region.boxes:
            _outline(pen, _corners(box, canvas), TRUTH, stroke, dash=4 * stroke)
    placed: list[tuple[float, float, float, float]] = []
    for number, region in enumerate(named):
        for box in region.boxes:
            pen.polygon(_corners(box, canvas), fill=(*colour(number), 40))
            _outline(pen, _corners(box, canvas), colour(number), stroke)
    # Labels come last: no outline may cross a word.
    for number, region in enumerate(named):
        for box in region.boxes:
            if region.phrase:
                _label(pen, canvas.size, _corners(box, canvas), region.phrase, colour(number), font, placed)
    return canvas


def contact_sheet(
    pictures: Sequence[tuple[Image.Image, str]],
    columns: int = 4,
    side: int = 320,
    background: str = "#14181c",
) -> Image.Image:
    """Pictures with captions on one page, row by row, each fitted into a square of `side` pixels."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = max(1, min(columns, len(pictures)))
    gap, font = side // 20, _font(max(12, side // 20))
    wrapped = [_wrap(caption, font, side) for _, caption in pictures]
    line = round(font.getbbox("Ág")[3] * 1.25)
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [side + gap // 2 + line * max(len(wrapped[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap * (len(rows) + 1)), background)
    pen = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (side + gap)
            fitted = _fit(pictures[i][0].convert("RGB"), side)
            sheet.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
            for k, text in enumerate(wrapped[i]):
                pen.text((left, top + side + gap // 2 + k * line), text, fill="#e8eaed", font=font)
        top += height + gap
    return sheet


def _region(entry: Region | Box) -> Region:
    return entry if isinstance(entry, Region) else Region("", [entry])


def _corners(box: Box, canvas: Image.Image) -> list[tuple[float, float]]:
    return [(x, y) for x, y in box.polygon(*canvas.size).tolist()]


def _outline(
    pen: ImageDraw.ImageDraw,
    corners: list[tuple[float, float]],
    ink: Colour,
    stroke: int,
    dash: int | None = None,
) -> None:
    """Closed outline with a dark rim, so that it shows on bright and dark ground alike."""
    for shade, width in (((0, 0, 0, 150), stroke + 2), ((*ink, 255), stroke)):
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            length = max(1.0, ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5)
            step = 2 * dash / length if dash else 2.0
            # A label that reaches far outside the image must not cost a million dashes.
            for k in range(min(500, int(1 / step) + 1)):
                s, e = k * step, min(1.0, k * step + step / 2)
                points = [(ax + t * (bx - ax), ay + t * (by - ay)) for t in (s, e)]
                pen.line(points, fill=shade, width=width)
            radius = width / 2 - 0.5
            pen.ellipse((ax - radius, ay - radius, ax + radius, ay + radius), fill=shade)


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corners: list[tuple[float, float]],
    text: str,
    ink: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    placed: list[tuple[float, float, float, float]],
) -> None:
    """Write the phrase on a plate beside the box: above, below, or inside, whichever is free and in the picture."""
    pad = 4
    first, *more = _wrap(text, font, max(40, size[0] // 2))
    text = f"{first} …" if more else first
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    x = min(max(0.0, min(xs)), max(0.0, size[0] - width))
    limit = max(0.0, size[1] - height)
    # Above, below, at the top edge inside, then further and further down.
    choices = [min(ys) - height - pad, max(ys) + pad, min(ys) + pad]
    choices += [max(ys) + pad + k * height for k in range(1, 12)]
    plates = [(x, y, x + width, y + height) for y in choices if 0 <= y <= limit]
    free = [plate for plate in plates if not any(_touch(plate, other) for other in placed)]
    y0 = min(max(0.0, choices[0]), limit)
    plate = (free or plates or [(x, y0, x + width, y0 + height)])[0]
    placed.append(plate)
    pen.rounded_rectangle(plate, radius=pad, fill=(*ink, 235))
    dark = sum(k * c for k, c in zip((0.299, 0.587, 0.114), ink, strict=True)) > 110
    pen.text(
        (plate[0] + pad - left, plate[1] + pad - top), text, fill="black" if dark else "white", font=font
    )


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, five at most; a word too long by itself is cut."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        current = ""
        for word in paragraph.split():
            while font.getlength(word) > width and len(word) > 1:
                word = word[:-2] + "…"
            trial = f"{current} {word}".strip()
            if current and font.getlength(trial) > width:
                lines.append(current)
                current = word
            else:
                current = trial
        lines.append(current)
    if len(lines) > 5:
        lines = [*lines[:4], lines[4] + " …"]
    return lines


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
