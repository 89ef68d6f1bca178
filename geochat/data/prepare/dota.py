"""DOTA's labels: one text file a picture, a line an object: eight corner coordinates, class, difficult.

Also the form of many other oriented data sets. The lines `imagesource:` and `gsd:` that DOTA-v1.0 puts first are read over.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from geochat.data.images import image_size
from geochat.data.prepare.detections import add_detection_options, convert, settings_of
from geochat.data.prepare.objects import LabelledObject, Picture, Tally, in_words, is_picture, outline

NAME = "from-dota"
HELP = "DOTA's text labels to instruction records"
_HEADERS = ("imagesource:", "gsd:")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", type=Path, required=True, help="folder of the .txt files (labelTxt)")
    parser.add_argument(
        "--keep-difficult", action="store_true", help="ask about objects marked as difficult, too"
    )
    add_detection_options(parser)


def run(options: argparse.Namespace) -> int:
    settings, tally = settings_of(options), Tally()
    pictures = list(
        read_pictures(options.images, options.labels, options.max_pixels, options.keep_difficult, tally)
    )
    classes = tuple(sorted({item.label for picture in pictures for item in picture.objects}))
    convert(
        pictures,
        replace(settings, classes=classes),
        tally,
        val_share=options.val_share,
        workers=options.workers,
        progress=not options.quiet,
    )
    return 0


def read_pictures(
    images: Path, labels: Path, max_pixels: int, keep_difficult: bool, tally: Tally
) -> Iterator[Picture]:
    """Every picture with its labels, in order of names.

    Raises:
        ValueError: a label file without a picture, two pictures of one name, or a line that cannot be read.
    """
    files = {
        path.relative_to(labels).with_suffix("").as_posix(): path for path in sorted(labels.rglob("*.txt"))
    }
    if not files:
        raise ValueError(
            f"--labels {labels}: {'no .txt file below it' if labels.is_dir() else 'no such folder'}"
        )
    pictures: dict[str, Path] = {}
    for path in sorted(path for path in images.rglob("*") if is_picture(path)):
        name = path.relative_to(images).with_suffix("").as_posix()
        if name in files and name in pictures:
            raise ValueError(
                f"{pictures[name]} and {path} would both have the labels of {files[name]}; remove one"
            )
        pictures[name] = path
    for name, file in files.items():
        if name not in pictures:
            raise ValueError(f"{file}: no picture {images / name} (.png, .jpg, .tif, …); is --images right?")
        width, height = image_size(pictures[name], max_pixels)
        found = tuple(read_labels(file, keep_difficult, tally))
        yield Picture(pictures[name].relative_to(images).as_posix(), width, height, found)
    tally.no_labels = len(pictures.keys() - files.keys())


def read_labels(file: Path, keep_difficult: bool, tally: Tally) -> Iterator[LabelledObject]:
    """The objects of one label file. Raises: ValueError naming file and line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}); is it a label file?") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].lower().startswith(_HEADERS):
            continue
        where = f"{file}:{number}"
        points, label, difficult = _parse(words, where)
        hull = outline(points, where, tally)
        if hull is None:
            continue
        tally.difficult += difficult and not keep_difficult
        yield LabelledObject(label, hull, difficult and not keep_difficult)


def _parse(words: list[str], where: str) -> tuple[list[tuple[float, float]], str, bool]:
    expected = "expected x1 y1 x2 y2 x3 y3 x4 y4 class difficult"
    if len(words) not in (9, 10):
        raise ValueError(f"{where}: {expected}, found {len(words)} words: {' '.join(words)!r:.80}")
    try:
        numbers = [float(word) for word in words[:8]]
    except ValueError as error:
        raise ValueError(f"{where}: {expected}; {error}") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}: {expected}; a coordinate is not finite: {' '.join(words[:8])}")
    mark = words[9] if len(words) == 10 else "0"
    if not mark.isdigit() or not in_words(words[8]):
        raise ValueError(f"{where}: {expected}; the last two words are {words[8]!r:.40} and {mark!r:.40}")
    return list(zip(numbers[::2], numbers[1::2], strict=True)), in_words(words[8]), mark != "0"
