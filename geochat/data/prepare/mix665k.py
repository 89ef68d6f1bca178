"""The images of LLaVA's llava_v1_5_mix665k.json: five data sets, each in the folder that the list names.

    coco/train2017   gqa/images   ocr_vqa/images   textvqa/train_images   vg/VG_100K and vg/VG_100K_2

OCR-VQA's covers were GIF and PNG files as well, and the list calls all of them .jpg: `--mend` adds the names of the list.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from geochat.data.prepare.geochat_instruct import is_clutter
from geochat.data.prepare.listing import count_by_folder, images_named
from geochat.data.prepare.safety import only_writer
from geochat.data.prepare.unzip import unpack_zip
from geochat.data.staged import staged, write_records
from geochat.data.store import InstructionStore

NAME = "mix665k"
HELP = "unpack the image archives of LLaVA's mix665k into their folders, and list what is missing"

_OTHER_SUFFIXES = (".gif", ".png", ".jpeg", ".JPG")


def _into(folder: str, *inner: str) -> Callable[[PurePosixPath], PurePosixPath | None]:
    """Files into one folder; with `inner`, only those that lie in a folder of such a name, which they keep."""

    def place(path: PurePosixPath) -> PurePosixPath | None:
        if is_clutter(path) or (inner and path.parent.name not in inner):
            return None
        return PurePosixPath(path.parent.name if inner else folder, path.name)

    return place


@dataclass(frozen=True)
class DataSet:
    """Where the archives of a data set go: `root`, and below it what `place` says."""

    flag: str
    root: str
    place: Callable[[PurePosixPath], PurePosixPath | None]
    archives: str


DATA_SETS = (
    DataSet("coco", "coco", _into("train2017", "train2017"), "train2017.zip"),
    DataSet("gqa", "gqa", _into("images"), "images.zip of GQA"),
    DataSet("ocr-vqa", "ocr_vqa", _into("images"), "a zip of OCR-VQA's covers"),
    DataSet("textvqa", "textvqa", _into("train_images", "train_images"), "train_val_images.zip"),
    DataSet("vg", "vg", _into("", "VG_100K", "VG_100K_2"), "images.zip and images2.zip of Visual Genome"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="image folder; coco/, gqa/, … below it")
    for data_set in DATA_SETS:
        parser.add_argument(
            f"--{data_set.flag}", type=Path, nargs="+", default=[], metavar="ZIP", help=data_set.archives
        )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="llava_v1_5_mix665k.json: report the images that are missing",
    )
    parser.add_argument(
        "--mend",
        action="store_true",
        help="give a .gif or .png the .jpg name of the list (a hard link, or a copy)",
    )
    parser.add_argument(
        "--missing", type=Path, metavar="FILE", help="write the names of missing images as JSON"
    )
    parser.add_argument(
        "--recheck", action="store_true", help="compare the CRC of images that are there already"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Unpack what is given, then report what the list names and the folders lack."""
    if (options.mend or options.missing) and not options.annotations:
        raise ValueError("--mend and --missing need the list: --annotations llava_v1_5_mix665k.json")
    if options.annotations:
        InstructionStore(options.annotations)
    for data_set in DATA_SETS:
        root = options.output / data_set.root
        for archive in getattr(options, data_set.flag.replace("-", "_")):
            with only_writer(root):
                counts = unpack_zip(
                    [archive], root, data_set.place, recheck=options.recheck, progress=not options.quiet
                )
            if not counts.written + counts.present:
                raise ValueError(
                    f"{archive}: holds nothing for {data_set.root}/; expected {data_set.archives}"
                )
            print(f"{root}: {archive.name}: {counts}")
    if not options.annotations:
        return 0
    images = list(images_named(options.annotations, not options.quiet))
    gaps = find_gaps(options.output, images)
    if options.mend:
        for image, other in gaps.misnamed.items():
            link(options.output / other, options.output / image)
        print(f"images that got the name of the list: {len(gaps.misnamed):,}")
        gaps.misnamed.clear()
    if options.missing:
        write_records(options.missing, gaps.missing)
    print(gaps.report(images))
    return 1 if gaps.missing or gaps.misnamed else 0


@dataclass
class Gaps:
    """Images of the list that are not there under their name."""

    missing: list[str]
    misnamed: dict[str, str]
    """Image of the list → the file that is there with another suffix."""

    def report(self, images: list[str], show: int = 3) -> str:
        """A row for each folder of the list, and examples."""
        named, missing = count_by_folder(images), count_by_folder(self.missing)
        misnamed = count_by_folder(list(self.misnamed))
        width = max(map(len, named), default=0)
        lines = [f"{'folder':{width}}    images   missing  other suffix"]
        for folder, count in sorted(named.items()):
            lines.append(f"{folder:{width}} {count:>9,} {missing[folder]:>9,} {misnamed[folder]:>13,}")
        lines += [f"missing: {name}" for name in self.missing[:show]]
        lines += [f"there as {other}: {name}; --mend" for name, other in list(self.misnamed.items())[:show]]
        return "\n".join(lines)


def find_gaps(root: Path, images: Iterable[str]) -> Gaps:
    """Which of `images` are absent below `root`. Each folder is read once: 665,000 look-ups would take longer."""
    folders: dict[str, set[str]] = {}
    gaps = Gaps([], {})
    for image in images:
        folder, _, name = image.rpartition("/")
        if folder not in folders:
            place = root / folder
            folders[folder] = {path.name for path in place.iterdir()} if place.is_dir() else set()
        if name in folders[folder]:
            continue
        stem = name.rpartition(".")[0]
        other = next((stem + suffix for suffix in _OTHER_SUFFIXES if stem + suffix in folders[folder]), None)
        if other:
            gaps.misnamed[image] = f"{folder}/{other}"
        else:
            gaps.missing.append(image)
    return gaps


def link(source: Path, target: Path) -> None:
    """A second name for a file. Pictures are read by their content: the suffix need not fit."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with staged(target) as temporary:
            shutil.copyfile(source, temporary)
