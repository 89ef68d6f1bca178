"""What every label format is read into: pictures with labelled outlines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from geochat.data.geometry import Point, area, convex_hull


@dataclass(frozen=True)
class LabelledObject:
    """An object: its class in words and its outline in pixels of the picture, a hull of `convex_hull`."""

    label: str
    outline: tuple[Point, ...]
    difficult: bool = False
    """Marked as hard to see, or a crowd in one outline: it is there, and nobody is asked about it."""

    @cached_property
    def bounds(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom."""
        xs, ys = [x for x, _ in self.outline], [y for _, y in self.outline]
        return min(xs), min(ys), max(xs), max(ys)

    @cached_property
    def area(self) -> float:
        return area(self.outline)


@dataclass(frozen=True)
class Picture:
    """A picture and what is labelled in it."""

    name: str
    """Path below the folder of the images, with `/`."""
    width: int
    height: int
    objects: tuple[LabelledObject, ...]
    cut_off: frozenset[str] = frozenset()
    """Classes of objects that show so little that they are not in `objects`."""

    @property
    def asked(self) -> list[LabelledObject]:
        """Objects that may be asked about."""
        return [item for item in self.objects if not item.difficult]

    @property
    def unclear(self) -> frozenset[str]:
        """Classes of which the picture shows more than `asked`: nobody can say how many there are."""
        return self.cut_off | {item.label for item in self.objects if item.difficult}


@dataclass
class Tally:
    """Labels that were read and not used, for the summary."""

    flat: int = 0
    first_flat: str = ""
    """File and row of the first outline without area."""
    difficult: int = 0
    no_labels: int = 0
    """Pictures without a label file."""

    def lines(self) -> list[str]:
        found = []
        if self.flat:
            found.append(f"labels without area, left out: {self.flat:,}, first {self.first_flat}")
        if self.difficult:
            found.append(f"objects that are difficult or a crowd, and not asked about: {self.difficult:,}")
        if self.no_labels:
            found.append(f"pictures without a label file, left out: {self.no_labels:,}")
        return found


def outline(points: Iterable[tuple[float, float]], where: str, tally: Tally) -> tuple[Point, ...] | None:
    """The hull of the points; None, counted, when it has no area."""
    hull = convex_hull(points)
    if area(hull) <= 0:
        tally.flat += 1
        tally.first_flat = tally.first_flat or where
        return None
    return tuple(hull)


def in_words(label: str) -> str:
    """`small-vehicle` and `small_vehicle` are "small vehicle"; case stays, for names such as Expressway."""
    return " ".join(label.replace("-", " ").replace("_", " ").split())


def is_picture(path: Path) -> bool:
    return (
        path.suffix.lower() in {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"} and path.is_file()
    )
