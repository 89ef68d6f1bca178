"""VHM's images: tar shards of VersaD and of the SFT set, one folder for each `source_dataset` of the list.

They are published as `crowdai/crowdai-000000.tar`, …; a record's image is `{output}/{source_dataset}/{image}`. The lists
spell some data sets differently from the shards, and in more than one way: `--map` renames.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from geochat.data.prepare.listing import add_check_options, check_listing, images_named
from geochat.data.prepare.safety import check_room, only_writer
from geochat.data.prepare.untar import unpack_shards
from geochat.data.prepare.unzip import Counts
from geochat.data.store import InstructionStore

NAME = "vhm"
HELP = "unpack VHM's tar shards, each data set into its folder"

_SHARD = re.compile(r"(.+)-\d+")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", type=Path, nargs="+", help=".tar files, or folders that hold them")
    parser.add_argument(
        "--output", type=Path, required=True, help="base folder; a folder for each data set below it"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="SHARDS=FOLDER",
        help="folder for the shards of a name (default: the name itself); may be repeated",
    )
    parser.add_argument(
        "--strip-components",
        type=int,
        default=0,
        metavar="N",
        help="leave out N leading folders of every member",
    )
    parser.add_argument(
        "--recheck", action="store_true", help="compare the contents of images that are there already"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_check_options(parser, "list_pretrain.json or list_sft.json")


def run(options: argparse.Namespace) -> int:
    """Unpack, then check the list against the images where one is given."""
    if options.annotations:
        InstructionStore(options.annotations)
    folders = by_folder(find_shards(options.shards), read_map(options.map))
    sizes = {folder: sum(shard.stat().st_size for shard in shards) for folder, shards in folders.items()}
    # The room is checked against the shards: their contents are as large, less 2 % at most for small images.
    there = sum(min(size, _held(options.output / folder)) for folder, size in sizes.items())
    check_room(options.output, sum(sizes.values()) - there)
    damaged = []
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc="unpacking", disable=options.quiet
    ) as bar:
        for folder, shards in folders.items():
            counts = Counts()
            with only_writer(options.output / folder):
                damaged += unpack_shards(
                    shards,
                    options.output / folder,
                    strip=options.strip_components,
                    recheck=options.recheck,
                    counts=counts,
                    bar=bar,
                )
            bar.write(f"{options.output / folder}: {counts}")
    if damaged:
        raise ValueError(f"damaged: {', '.join(damaged)}; download them again and repeat the command")
    if options.annotations:
        # Malformed rows are named by the report that follows.
        named = list(images_named(options.annotations, not options.quiet, skip_malformed=True))
        for hint in unmatched(options.output, named):
            print(hint)
    return check_listing(options, options.output)


def find_shards(paths: Sequence[Path]) -> list[Path]:
    """Raises: ValueError when a path is no tar file and no folder that holds some."""
    found: list[Path] = []
    for path in paths:
        shards = sorted(path.rglob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
        if not shards:
            raise ValueError(f"{path}: {'no .tar below it' if path.is_dir() else 'no such file'}")
        for shard in shards:
            with shard.open("rb") as file:
                head = file.read(512)
            # tarfile knows a header by "ustar" at byte 257, in the POSIX and in the GNU form.
            if head[257:262] != b"ustar":
                raise ValueError(
                    f"{shard}: not an uncompressed tar; unpack a .gz first, or download it again"
                )
        found += shards
    return list(dict.fromkeys(found))


def read_map(pairs: Sequence[str]) -> dict[str, str]:
    """`SHARDS=FOLDER` pairs as a table. Raises: ValueError on one that is neither."""
    table = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(f"--map {pair}: expected SHARDS=FOLDER, for example crowdai=crowdAI")
        table[name] = folder
    return table


def by_folder(shards: Sequence[Path], renamed: dict[str, str]) -> dict[str, list[Path]]:
    """Shards by the folder that they go to.

    Raises:
        ValueError: a name in `renamed` that no shard has.
    """
    names = {shard: dataset_of(shard) for shard in shards}
    if unknown := sorted(renamed.keys() - names.values()):
        raise ValueError(
            f"--map {unknown[0]}=…: no shard of that name; there are {', '.join(sorted(set(names.values())))}"
        )
    folders: dict[str, list[Path]] = {}
    for shard, name in names.items():
        folders.setdefault(renamed.get(name, name), []).append(shard)
    return folders


def dataset_of(shard: Path) -> str:
    """`crowdai-000000.tar` belongs to crowdai; a shard without a number, to the folder that it lies in."""
    match = _SHARD.fullmatch(shard.stem)
    return match[1] if match else shard.absolute().parent.name


def unmatched(base: Path, images: list[str]) -> list[str]:
    """One line for every data set of the list that has no folder, with the folder that may be meant."""
    present = [entry.name for entry in os.scandir(base) if entry.is_dir()]
    lines = []
    for name, count in sorted(Counter(image.split("/")[0] for image in images).items()):
        if name not in present:
            alike = difflib.get_close_matches(name.lower(), [folder.lower() for folder in present], 1)
            meant = next((folder for folder in present if alike and folder.lower() == alike[0]), None)
            hint = (
                f"; {meant} is there: --map {meant}={name}, or a link, if both names are in use"
                if meant
                else ""
            )
            lines.append(f"no folder {name} for {count:,} images of the list{hint}")
    return lines


def _held(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum((Path(place) / name).stat().st_size for place, _, names in os.walk(folder) for name in names)
