"""GeoChat_Instruct's images: a zip of about 102 GB, published in parts, into one flat folder."""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath

from geochat.data.prepare.listing import add_check_options, check_listing
from geochat.data.prepare.safety import only_writer
from geochat.data.prepare.unzip import unpack_zip
from geochat.data.store import InstructionStore

NAME = "geochat-instruct"
HELP = "join and unpack GeoChat_Instruct's images_parta* in one go, without a second copy"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", type=Path, nargs="+", help="images_partaa images_partab … (images_parta*)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument(
        "--recheck", action="store_true", help="compare the CRC of images that are there already"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_check_options(parser, "GeoChat_Instruct.json")


def run(options: argparse.Namespace) -> int:
    """Unpack, then check the instruction file against the images where one is given."""
    if options.annotations:
        InstructionStore(options.annotations)  # a wrong path shall not wait for 102 GB
    with only_writer(options.output):
        counts = unpack_zip(
            options.parts, options.output, flat, recheck=options.recheck, progress=not options.quiet
        )
    print(f"{options.output}: {counts}")
    return check_listing(options, options.output)


def flat(path: PurePosixPath) -> PurePosixPath | None:
    """The file's own name: the folders in the archive are those of the machine it was made on."""
    return None if is_clutter(path) else PurePosixPath(path.name)


def is_clutter(path: PurePosixPath) -> bool:
    """What file managers add to archives."""
    return (
        path.parts[0] == "__MACOSX" or path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db")
    )
