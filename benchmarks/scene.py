"""Objects found in a large scene, tile by tile, against the objects that its tiles find on their own.

    python benchmarks/scene.py [--model-path playground/nano] [--side 4000 --objects 40 --tile 500 --overlap 0.25]

Draws a GeoTIFF of known objects: cells as large as a tile, some of them scenes of `geochat.data.synthetic`, the others
empty ground, none of them where a tile lies. Then it runs the command line on it and compares:

  scene     objects of boxes.geojson against all objects
  per tile  the boxes of each tile's own answer against the objects that lie wholly in that tile, over all tiles

and takes the corners in boxes.geojson back from longitude and latitude to pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.transform import Affine
from rasterio.warp import transform

from geochat.data.phrases import DESCRIBE
from geochat.data.rows import read_rows
from geochat.data.synthetic import draw_scene
from geochat.data.tiles import tile_scene
from geochat.eval.metrics import match_boxes
from geochat.serve import cli
from geochat.serve.batch import ANSWERS
from geochat.serve.scenes import GEOJSON

REPOSITORY = Path(__file__).resolve().parents[1]
CRS, PLACE = "EPSG:32633", Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)
SEED = 1 << 41  # no training or test scene has such a seed
EMPTY = 6  # different empty cells, each turned and mirrored in eight ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=REPOSITORY / "playground" / "nano")
    parser.add_argument("--side", type=int, default=4000, help="of the scene, in pixels")
    parser.add_argument("--objects", type=int, default=40)
    parser.add_argument("--tile", type=int, default=500)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--output", type=Path, help="folder to keep the scene and the answers in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        output = args.output or Path(name)
        output.mkdir(parents=True, exist_ok=True)
        objects = write_scene(output / "scene.tif", args.side, args.tile, args.objects)
        command = ["--model-path", str(args.model_path), "--image-file", str(output / "scene.tif")]
        command += ["--tile", str(args.tile), "--overlap", str(args.overlap), "--prompt", DESCRIBE]
        started = time.perf_counter()
        cli.main([*command, "--output", str(output / "found")])
        seconds = time.perf_counter() - started
        report(args, objects, output / "found", seconds)


def write_scene(path: Path, side: int, cell: int, count: int) -> list[np.ndarray]:
    """A GeoTIFF of drawn cells. Returns the objects, polygons [4, 2] in its pixels."""
    rng = np.random.default_rng(0)
    across = -(-side // cell)
    filled, empty = draw_cells(cell, count)
    places = rng.permutation(across * across)
    if len(filled) > len(places):
        raise SystemExit(f"error: {count} objects need {len(filled)} cells; the scene has {len(places)}")
    pixels = np.zeros((across * cell, across * cell, 3), np.uint8)
    objects: list[np.ndarray] = []
    for number, place in enumerate(places):
        top, left = cell * (place // across), cell * (place % across)
        if number < len(filled):
            picture, polygons = filled[number]
            objects += [polygon * cell + np.array((left, top)) for polygon in polygons]
        else:
            picture = turned(empty[number % len(empty)], number // len(empty))
        pixels[top : top + cell, left : left + cell] = np.asarray(picture)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8"}
    profile |= {"tiled": True, "compress": "deflate", "crs": CRS, "transform": PLACE}
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels[:side, :side].transpose(2, 0, 1))
    return objects


def draw_cells(cell: int, count: int) -> tuple[list[tuple[Image.Image, list[np.ndarray]]], list[Image.Image]]:
    """Scenes that hold `count` objects together, and empty ones."""
    filled: list[tuple[Image.Image, list[np.ndarray]]] = []
    seed = SEED
    while count:
        scene = draw_scene(seed, cell)
        seed += 1
        if 0 < len(scene.objects) <= count:
            filled.append((scene.image, [item.polygon() for item in scene.objects]))
            count -= len(scene.objects)
    empty: list[Image.Image] = []
    while len(empty) < EMPTY:
        scene = draw_scene(seed, cell, "forest")
        seed += 1
        if not scene.objects:
            empty.append(scene.image)
    return filled, empty


def turned(picture: Image.Image, way: int) -> Image.Image:
    turn = picture.rotate(90 * (way % 4))
    return turn.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if way % 8 >= 4 else turn


def report(args: argparse.Namespace, objects: list[np.ndarray], folder: Path, seconds: float) -> None:
    features = json.loads((folder / GEOJSON).read_text())["features"]
    found = [np.array(feature["properties"]["pixels"]) for feature in features]
    tiles = {tile.name: tile for tile in tile_scene(args.side, args.side, args.tile, args.overlap)}
    seen: list[float] = []
    predicted = 0
    for row in read_rows(folder / ANSWERS):
        tile = tiles[row["name"]]
        low, high = (
            np.array((tile.left, tile.top)),
            np.array((tile.left + tile.width, tile.top + tile.height)),
        )
        whole = [one for one in objects if (one >= low).all() and (one <= high).all()]
        boxes = [np.array(box["polygon"]) for box in row["boxes"]]
        seen += match_boxes(whole, boxes, "rotated")
        predicted += len(boxes)
    merged = match_boxes(objects, found, "rotated")
    print(f"{args.side} x {args.side} pixels, {len(tiles)} tiles of {args.tile}, overlap {args.overlap:g}")
    print(f"{'':10}{'objects':>9}{'boxes':>7}{'recall, IoU 0.25':>18}{'0.5':>7}{'precision':>11}{'0.5':>7}")
    for name, values, boxes in (("scene", merged, len(found)), ("per tile", seen, predicted)):
        hits = [sum(value >= least for value in values) for least in (0.25, 0.5)]
        recall = [f"{100 * hit / max(1, len(values)):.1f}" for hit in hits]
        precision = [f"{100 * hit / max(1, boxes):.1f}" for hit in hits]
        print(
            f"{name:10}{len(values):>9}{boxes:>7}{recall[0]:>18}{recall[1]:>7}{precision[0]:>11}{precision[1]:>7}"
        )
    print(f"corners back from longitude and latitude: at most {farthest(features):.1e} pixels away")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.0f} s, load {os.getloadavg()[0]:.1f}, peak memory {peak:.0f} MB (drawing included)")


def farthest(features: list[dict]) -> float:
    """Distance in pixels between the corners and where longitude and latitude put them."""
    worst = 0.0
    for feature in features:
        ring = feature["geometry"]["coordinates"][0][:-1]
        native = transform("EPSG:4326", CRS, *zip(*ring, strict=True))
        pixels = np.array([~PLACE @ point for point in zip(*native, strict=True)])
        corners = np.array(feature["properties"]["pixels"])
        gaps = np.linalg.norm(pixels[:, None] - corners[None], axis=2).min(axis=1)
        worst = max(worst, float(gaps.max()))
    return worst


if __name__ == "__main__":
    main()
