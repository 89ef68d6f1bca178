"""The AID scenes as this example reads them: which are for training, which are GeoChat-Bench's test, how it asks.

The data folder holds `aid150.jsonl`, one row per scene (`image`, `path`, `label_text`, `captions`, `rsicd_split`,
`geochat_bench_aid_test`), and the pictures in `aid150/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from geochat.data.images import open_image
from geochat.data.phrases import scene_prompt

CLASSES = (
    "Medium Residential", "Storage Tanks", "Beach", "Sparse Residential", "Square", "Pond", "River", "Commercial",
    "Bare Land", "Desert", "Airport", "Bridge", "Dense Residential", "Forest", "Viaduct", "Church", "Farmland", "School",
    "Center", "Park", "Baseball Field", "Meadow", "Industrial", "Stadium", "Parking", "Railway Station", "Port",
    "Mountain", "Playground", "Resort",
)  # fmt: skip
"""In the order of GeoChat-Bench."""

PROMPT = scene_prompt(CLASSES)
"""GeoChat-Bench's question about every scene."""


@dataclass(frozen=True)
class AidScene:
    file: str
    """Name in the data folder: `airport_1.jpg`."""
    path: str
    """Name in AID and in GeoChat-Bench: `Airport/airport_1.jpg`."""
    label: str
    captions: tuple[str, ...]
    test: bool
    """One of the images of GeoChat-Bench's AID test."""

    @property
    def number(self) -> int:
        return CLASSES.index(self.label)


def read_scenes(data: Path) -> tuple[list[AidScene], list[AidScene]]:
    """(training scenes, test scenes). Scenes of RSICD's own test that GeoChat-Bench does not ask about are in neither.

    Raises: ValueError when the listing is absent or malformed, or when a picture is both for training and for testing.
    """
    listing = data / "aid150.jsonl"
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file; name the folder that holds aid150.jsonl and aid150/")
    train, test = [], []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            scene = AidScene(
                file=row["image"],
                path=row["path"].removeprefix("AID/"),
                label=row["label_text"],
                captions=tuple(dict.fromkeys(tidy(caption) for caption in row["captions"])),
                test=row["geochat_bench_aid_test"],
            )
            unused = row["rsicd_split"] == "test" and not scene.test
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{listing}: row {number}: {error!r}") from None
        if scene.label not in CLASSES:
            raise ValueError(f"{listing}: row {number}: {scene.label!r} is no class of AID")
        if not unused:
            (test if scene.test else train).append(scene)
    shared = {scene.file for scene in train} & {scene.file for scene in test}
    if shared:
        raise ValueError(f"{listing}: {len(shared)} pictures are in training and test: {sorted(shared)[0]} …")
    return train, test


def tidy(caption: str) -> str:
    """RSICD's spelling as prose: "many planes are parked ." → "Many planes are parked." """
    words = " ".join(caption.split()).rstrip(" .")
    return words[:1].upper() + words[1:] + "."


def read_pixels(data: Path, scenes: list[AidScene], side: int) -> np.ndarray:
    """Pictures as uint8 [scene, side, side, 3], resized as the model's own processor does it."""
    pixels = np.empty((len(scenes), side, side, 3), np.uint8)
    for row, scene in zip(pixels, scenes, strict=True):
        image = open_image(data / "aid150" / scene.file)
        row[:] = image.resize((side, side), Image.Resampling.BICUBIC)
    return pixels
