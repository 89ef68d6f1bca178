"""COCO's object annotations: upright boxes, or the outlines as oriented boxes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from geochat.data.geometry import Point
from geochat.data.images import image_size
from geochat.data.prepare.detections import add_detection_options, convert, settings_of
from geochat.data.prepare.objects import LabelledObject, Picture, Tally, in_words, outline
from geochat.data.prepare.safety import safe_path

NAME = "from-coco"
HELP = "COCO's object annotations to instruction records"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, required=True, help="the JSON file (instances_….json)")
    parser.add_argument(
        "--oriented",
        action="store_true",
        help="oriented boxes around the outlines (segmentation), where there are any",
    )
    add_detection_options(parser)


def run(options: argparse.Namespace) -> int:
    settings, tally = settings_of(options), Tally()
    content = _read(options.annotations)
    pictures = list(
        read_pictures(
            content, options.annotations, options.images, options.max_pixels, options.oriented, tally
        )
    )
    classes = tuple(sorted(set(_categories(content, options.annotations).values())))
    convert(
        pictures,
        replace(settings, classes=classes),
        tally,
        val_share=options.val_share,
        workers=options.workers,
        progress=not options.quiet,
    )
    return 0


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{file}: no list "{key}" of objects; expected COCO\'s object annotations')
    return content


def read_pictures(
    content: dict[str, Any], file: Path, images: Path, max_pixels: int, oriented: bool, tally: Tally
) -> Iterator[Picture]:
    """Every picture with its labels, in order of names.

    Raises:
        ValueError: the row of `file` that cannot be used, or a picture that is absent or has another size.
    """
    categories = _categories(content, file)
    names: dict[Any, tuple[str, str]] = {}
    files: set[str] = set()
    for row, image in enumerate(content["images"]):
        where = f"{file}: images[{row}]"
        name = image.get("file_name")
        if not isinstance(name, str) or not name or image.get("id") is None:
            raise ValueError(f'{where}: "id" or "file_name" is missing')
        try:
            safe_path(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if image["id"] in names:
            raise ValueError(f'{where}: "id" {image["id"]!r} is that of {names[image["id"]][0]}, too')
        if name in files:
            raise ValueError(f'{where}: "file_name" {name} stands there twice; merge the two rows')
        files.add(name)
        names[image["id"]] = (name, where)
    objects: dict[Any, list[LabelledObject]] = {identity: [] for identity in names}
    for row, annotation in enumerate(content["annotations"]):
        where = f"{file}: annotations[{row}]"
        if annotation.get("image_id") not in names:
            raise ValueError(f'{where}: "image_id" {annotation.get("image_id")!r} is in no row of "images"')
        if annotation.get("category_id") not in categories:
            raise ValueError(
                f'{where}: "category_id" {annotation.get("category_id")!r} is in no row of "categories"'
            )
        hull = outline(_points(annotation, oriented, where), where, tally)
        if hull is not None:
            crowd = bool(annotation.get("iscrowd"))
            tally.difficult += crowd
            label = categories[annotation["category_id"]]
            objects[annotation["image_id"]].append(LabelledObject(label, hull, crowd))
    stated = {image["id"]: (image.get("width"), image.get("height")) for image in content["images"]}
    for identity, (name, where) in sorted(names.items(), key=lambda item: item[1][0]):
        try:
            size = image_size(images / name, max_pixels)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; is --images right?") from None
        if stated[identity] != (None, None) and stated[identity] != size:
            width, height = stated[identity]
            raise ValueError(
                f"{where}: {name} is {size[0]} x {size[1]} pixels, its labels are for {width} x {height}; "
                "use the pictures that were labelled, not turned or resized"
            )
        yield Picture(name, *size, tuple(objects[identity]))


def _categories(content: dict[str, Any], file: Path) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for row, category in enumerate(content["categories"]):
        name = category.get("name")
        if category.get("id") is None or not isinstance(name, str) or not in_words(name):
            raise ValueError(f'{file}: categories[{row}]: "id" or "name" is missing')
        found[category["id"]] = in_words(name)
    return found


def _points(annotation: dict[str, Any], oriented: bool, where: str) -> list[Point]:
    """Corners of the upright box; with `oriented`, or without a box, the points of the outlines."""
    rings, box = annotation.get("segmentation"), annotation.get("bbox")
    if not isinstance(rings, list) or not all(isinstance(ring, list) for ring in rings):
        rings = []  # run lengths: their box is used
    if rings and (oriented or box is None):
        numbers = [_numbers(ring, where, "segmentation") for ring in rings]
        if any(len(ring) % 2 or len(ring) < 6 for ring in numbers):
            raise ValueError(f'{where}: "segmentation" must be lists of x, y of three points or more')
        points = [point for ring in numbers for point in zip(ring[::2], ring[1::2], strict=True)]
        if oriented:
            return points
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return _corners(min(xs), min(ys), max(xs), max(ys))
    numbers_of_box = _numbers(box, where, "bbox") if isinstance(box, list) else []
    if len(numbers_of_box) != 4:
        raise ValueError(f'{where}: "bbox" must be [x, y, width, height], found {box!r:.60}')
    x, y, width, height = numbers_of_box
    if width < 0 or height < 0:
        raise ValueError(f'{where}: "bbox" has a negative side: {box!r:.60}; expected [x, y, width, height]')
    return _corners(x, y, x + width, y + height)


def _corners(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _numbers(values: list[Any], where: str, key: str) -> list[float]:
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise ValueError(f'{where}: "{key}" holds something that is no finite number: {values!r:.60}')
    return [float(value) for value in values]
