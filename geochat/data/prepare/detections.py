"""From labelled pictures to instruction records: windows, questions, split; shared by the label formats."""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from geochat.data.images import open_image
from geochat.data.pool import process_pool
from geochat.data.prepare.objects import Picture, Tally
from geochat.data.prepare.questions import TASKS, Asker, Question, ask, conversations
from geochat.data.prepare.records import add_split_options, check_split, checked, write_split
from geochat.data.prepare.safety import only_writer
from geochat.data.prepare.windows import Rectangle, cut, starts, windows
from geochat.data.sample import Sample, Turn, user_turn
from geochat.data.staged import staged

# Level 3 takes a third of the time of Pillow's 6 and makes files 8 % larger.
_FORMATS = {"png": ("PNG", {"compress_level": 3}), "jpg": ("JPEG", {"quality": 95})}


@dataclass(frozen=True)
class Settings:
    """How pictures become records; the fields are the flags."""

    images: Path
    output: Path
    window: int
    overlap: int
    visible: float
    format: str
    max_pixels: int
    tasks: tuple[str, ...]
    per_task: int
    turns: int
    max_objects: int
    min_iou: float
    seed: int
    classes: tuple[str, ...] = ()


@dataclass
class Made:
    """What became of one picture, or of all of them."""

    records: list[dict[str, Any]] = field(default_factory=list)
    windows: int = 0
    used: int = 0
    """Windows, or whole pictures, that something was asked about."""
    fits: list[float] = field(default_factory=list)
    """`Item.fit` of every object shown."""


def add_detection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument(
        "--window", type=int, default=504, help="side of the windows in pixels; 0 asks about whole pictures"
    )
    parser.add_argument("--overlap", type=int, default=100, help="pixels that neighbouring windows share")
    parser.add_argument(
        "--visible",
        type=float,
        default=0.5,
        help="least share of an object inside a window; less is left out",
    )
    parser.add_argument("--format", choices=sorted(_FORMATS), default="png", help="of the windows")
    parser.add_argument("--max-pixels", type=int, default=1_000_000_000, help="larger pictures are refused")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK",
                        help=f"questions to ask, of: {' '.join(TASKS)}")  # fmt: skip
    parser.add_argument("--per-task", type=int, default=2, help="most questions of a task on one window")
    parser.add_argument("--turns", type=int, default=5, help="most questions in one conversation")
    parser.add_argument(
        "--max-objects",
        type=int,
        default=20,
        help="most objects of a class to be counted or pointed at together",
    )
    parser.add_argument(
        "--min-iou", type=float, default=0.5, help="least IoU of a box with itself rounded to whole percent"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; 0: this one"
    )
    add_split_options(parser)


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises: ValueError for a value that cannot be used; the flag is named."""
    if not options.images.is_dir():
        raise ValueError(f"--images {options.images}: no such folder")
    if options.window:
        starts(options.window, options.window, options.overlap)
    for flag in ("visible", "min_iou"):
        if not 0 <= getattr(options, flag) <= 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must lie between 0 and 1")
    for flag in ("per_task", "turns", "max_objects"):
        if getattr(options, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be at least 1")
    check_split(options.val_share, options.seed)
    names = [name for name in Settings.__dataclass_fields__ if name not in ("classes", "tasks")]
    return Settings(
        **{name: getattr(options, name) for name in names}, tasks=tuple(dict.fromkeys(options.tasks))
    )


def records_of(picture: Picture, settings: Settings) -> Made:
    """Records of one picture; its windows are written. The same seed and name give the same records."""
    made = Made()
    used: list[tuple[Rectangle, str]] = []
    for rectangle, shown in _shown(picture, settings):
        made.windows += 1
        # Seeded by the name, not by a running number: other pictures must not change what is asked about this one.
        rng = np.random.default_rng([settings.seed, zlib.crc32(shown.name.encode())])
        asker = Asker(shown, settings.classes, rng, settings.max_objects, settings.min_iou)
        if not asker.items:
            continue
        made.fits += [item.fit for item in asker.items]
        talks = conversations(ask(asker, settings.tasks, settings.per_task), settings.turns)
        made.records += [_record(shown.name, number, talk) for number, talk in enumerate(talks)]
        if talks:
            used.append((rectangle, shown.name))
    made.used = len(used)
    if settings.window:
        _write_windows(picture, used, settings)
    return made


def _shown(picture: Picture, settings: Settings) -> Iterator[tuple[Rectangle, Picture]]:
    """The picture's windows with their labels; the picture itself where none are cut."""
    if not settings.window:
        yield (0, 0, picture.width, picture.height), picture
        return
    stem = _stem(picture.name)
    for rectangle in windows(picture.width, picture.height, settings.window, settings.overlap):
        name = f"{stem}__{'_'.join(map(str, rectangle))}.{settings.format}"
        yield rectangle, cut(picture, rectangle, name, settings.visible)


def _stem(name: str) -> str:
    """What the names of a picture's windows begin with."""
    return name.rpartition(".")[0] or name


def _record(name: str, number: int, talk: Sequence[Question]) -> dict[str, Any]:
    said = [
        turn
        for k, question in enumerate(talk)
        for turn in (user_turn(question.text, images=int(k == 0)), Turn("assistant", question.answer))
    ]
    return checked(Sample(f"{name}#{number}", (name,), tuple(said)))


def _write_windows(picture: Picture, used: Sequence[tuple[Rectangle, str]], settings: Settings) -> None:
    """Windows that an earlier run wrote stay: their name says what they show."""
    source, folder = settings.images / picture.name, settings.output / "images"
    since = source.stat().st_mtime
    to_do = [
        (rectangle, folder / name)
        for rectangle, name in used
        if not (folder / name).exists() or (folder / name).stat().st_mtime < since
    ]
    if not to_do:
        return
    kind, options = _FORMATS[settings.format]
    image = open_image(source, max_pixels=settings.max_pixels)
    for rectangle, target in to_do:
        with staged(target, within=folder) as temporary:
            image.crop(rectangle).save(temporary, kind, **options)


def convert(
    pictures: Sequence[Picture],
    settings: Settings,
    tally: Tally,
    *,
    val_share: float,
    workers: int,
    progress: bool,
) -> None:
    """Write OUTPUT/train.json, val.json where asked for, and the windows below OUTPUT/images; print a summary.

    Raises:
        ValueError: there is nothing to ask, two windows would get one name, or an image cannot be read.
    """
    if not any(picture.asked for picture in pictures):
        raise ValueError(
            f"{settings.images}: no labelled object in {len(pictures)} pictures; do labels and images fit?"
        )
    if settings.window:
        stems: dict[str, str] = {}
        for picture in pictures:
            if (other := stems.setdefault(_stem(picture.name), picture.name)) != picture.name:
                raise ValueError(f"windows of {other} and {picture.name} would have one name; rename one")
    folder = settings.output / "images" if settings.window else settings.output
    with only_writer(folder):
        done = _all_records(pictures, settings, workers)
        made = list(
            tqdm(done, total=len(pictures), desc="pictures", disable=not progress, dynamic_ncols=True)
        )
    if not any(part.records for part in made):
        raise ValueError(
            f"{settings.images}: nothing to ask with --tasks {' '.join(settings.tasks)}, --visible {settings.visible} "
            f"and --min-iou {settings.min_iou}; name other tasks or lower the two"
        )
    counts = write_split(
        settings.output,
        {picture.name: part.records for picture, part in zip(pictures, made, strict=True)},
        val_share,
        settings.seed,
    )
    print("\n".join([*counts, *_summary(made, settings), *tally.lines()]))


def _all_records(pictures: Sequence[Picture], settings: Settings, workers: int) -> Iterator[Made]:
    work = partial(records_of, settings=settings)
    if workers <= 1:
        yield from map(work, pictures)
        return
    with process_pool(workers) as pool:
        yield from pool.map(work, pictures, chunksize=4)


def _summary(made: Sequence[Made], settings: Settings) -> list[str]:
    fits = np.array([fit for part in made for fit in part.fits])
    what = "windows" if settings.window else "pictures"
    folder = settings.output / "images" if settings.window else settings.images
    low = ", ".join(f"{(fits < bound).mean():.1%} below {bound}" for bound in (0.5, 0.75))
    return [
        f"{what} with something to ask: {sum(part.used for part in made):,} of "
        f"{sum(part.windows for part in made):,}; --image_folder {folder}",
        f"boxes: {len(fits):,}; IoU after rounding to whole percent: mean {fits.mean():.3f}, {low}"
        f" (below --min-iou {settings.min_iou} none is told)",
    ]
