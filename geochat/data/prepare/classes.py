"""A folder of pictures for each class → scene classification records."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from geochat.data.phrases import scene_prompt
from geochat.data.prepare.objects import in_words, is_picture
from geochat.data.prepare.records import add_split_options, checked, held_out, write_split
from geochat.data.sample import Sample, Turn, user_turn

NAME = "from-classes"
HELP = "a folder for each class to scene classification records"


def training_prompt(classes: Sequence[str]) -> str:
    """The wording of GeoChat's training file for NWPU-RESISC45, which is not that of its benchmark."""
    return (
        f"Classify the given image in one of the following classes: {', '.join(classes)}. "
        "Answer in one word or a short phrase."
    )


_PROMPTS = {"benchmark": scene_prompt, "training": training_prompt}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, required=True, help="folder that holds a folder for each class"
    )
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help='names in the order of the prompt, with commas: "dense residential, river"; spaces, hyphens and case may '
        "differ from the folders'. Default: the folders in alphabetical order",
    )
    parser.add_argument(
        "--prompt",
        choices=sorted(_PROMPTS),
        default="benchmark",
        help="GeoChat-Bench's wording, or the training file's",
    )
    add_split_options(parser)


def run(options: argparse.Namespace) -> int:
    folders = match_classes(options.images, options.classes)
    question = user_turn(_PROMPTS[options.prompt](list(folders)), images=1)
    records, held = {}, set()
    for label, folder in folders.items():
        names = sorted(
            path.relative_to(options.images).as_posix() for path in folder.rglob("*") if is_picture(path)
        )
        if not names:
            raise ValueError(f"{folder}: no pictures; remove the folder, or name the others with --classes")
        # Class by class, so that every one keeps its share.
        try:
            held |= held_out(names, options.val_share, options.seed)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        for name in names:
            records[name] = [checked(Sample(name, (name,), (question, Turn("assistant", label))))]
    lines = write_split(options.output, records, options.val_share, options.seed, held)
    print("\n".join([*lines, f"{len(folders)} classes; --image_folder {options.images}"]))
    return 0


def match_classes(images: Path, names: str | None) -> dict[str, Path]:
    """Class in words → its folder, in the order of the prompt.

    Raises:
        ValueError: no folders, or names and folders that do not belong together one to one.
    """
    if not images.is_dir():
        raise ValueError(f"--images {images}: no such folder")
    folders = sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"--images {images}: holds no folders; expected one for each class")
    if names is None:
        found = {in_words(folder.name): folder for folder in folders}
        if len(found) < len(folders):
            raise ValueError(f"--images {images}: two folders have one name but for hyphens; use --classes")
        return found
    by_key: dict[str, Path] = {}
    for folder in folders:
        if (other := by_key.setdefault(_key(folder.name), folder)) is not folder:
            raise ValueError(f"{other} and {folder} have one name but for spaces and case; rename one")
    wanted = [" ".join(name.split()) for name in names.split(",") if name.strip()]
    keys = [_key(name) for name in wanted]
    for name, key in zip(wanted, keys, strict=True):
        if key not in by_key:
            raise ValueError(f"--classes: no folder for {name!r} below {images}")
        if keys.count(key) > 1:
            raise ValueError(f"--classes: {name!r} stands there twice")
    if left := [folder.name for key, folder in by_key.items() if key not in keys]:
        raise ValueError(
            f"--classes: {left[0]!r} is a folder below {images} and is not listed; add or move it"
        )
    return {name: by_key[key] for name, key in zip(wanted, keys, strict=True)}


def _key(name: str) -> str:
    """A name without what spellings differ in: "Dense-Residential" and "denseresidential" are one."""
    return re.sub(r"[\W_]", "", name.casefold())
