"""Large scenes: windows of a file as pictures, its objects each once, and where they lie on Earth."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("rasterio")

import rasterio
from PIL import Image
from rasterio.transform import Affine
from rasterio.warp import transform

from geochat.chat.engine import Answer
from geochat.data.boxes import Box
from geochat.data.rows import read_rows
from geochat.data.tiles import Tile, tile_scene
from geochat.serve import cli
from geochat.serve.raster import open_scene

UTM = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)}
TURNED = {"crs": "EPSG:32633", "transform": Affine(0.4, 0.3, 500_000, 0.3, -0.4, 5_400_000)}
OBJECTS = [(10, 20, 30, 40), (90, 90, 110, 106), (170, 30, 190, 60), (60, 190, 85, 215), (200, 200, 250, 240)]
"""left, top, right, bottom in pixels; several lie on the edges of tiles of 100 pixels."""


def write(path: Path, samples: np.ndarray, **profile) -> Path:
    """A GeoTIFF out of [bands, height, width]."""
    bands, height, width = samples.shape
    shape = {"count": bands, "height": height, "width": width, "dtype": samples.dtype.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as file:
            file.write(samples)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    samples = np.full((3, 260, 300), 20, np.uint8)
    for number, (left, top, right, bottom) in enumerate(OBJECTS):
        samples[:, top:bottom, left:right] = np.array([[[255]], [[40 * number]], [[200]]])
    return write(tmp_path / "scene.tif", samples, **UTM)


class Seer:
    """Sees every object exactly: bounding boxes of what is red, in whole percent of the tile."""

    def answer_each(self, requests, **options):
        return [Answer(self.describe(np.asarray(request.images[0])), (), True) for request in requests]

    def describe(self, pixels: np.ndarray) -> str:
        height, width = pixels.shape[:2]
        said = []
        for shade in np.unique(pixels[pixels[:, :, 0] == 255][:, 1]):
            rows, columns = np.nonzero((pixels[:, :, 0] == 255) & (pixels[:, :, 1] == shade))
            corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            said.append(f"<p>ship</p> {Box.from_pixels(*corners, width, height).format()}")
        return " and ".join(said) or "nothing"


@pytest.fixture
def detect(monkeypatch, tmp_path: Path):
    """Runs the command with tiles of 100 pixels, in which whole percent are pixels. Returns the features."""
    monkeypatch.setattr(cli, "load_chat", lambda arguments: Seer())

    def run(file: Path, *more: str) -> list[dict]:
        arguments = ["--model-path", "m", "--image-file", str(file), "--prompt", "q", "--tile", "100"]
        assert cli.main([*arguments, "--output", str(tmp_path / "out"), *more]) == 0
        collection = json.loads((tmp_path / "out" / "boxes.geojson").read_text())
        assert collection["type"] == "FeatureCollection"
        return collection["features"]

    return run


def corners_of(feature: dict) -> np.ndarray:
    ring = feature["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    return np.array(ring[:-1])


def sorted_rows(points) -> np.ndarray:
    return np.array(sorted(np.asarray(points).round(9).tolist()))


def rectangles() -> dict[tuple[int, ...], list[tuple[int, int]]]:
    return {
        (left, top, right, bottom): [(left, top), (right, top), (right, bottom), (left, bottom)]
        for left, top, right, bottom in OBJECTS
    }


def envelope(feature: dict) -> tuple[int, ...]:
    pixels = np.array(feature["properties"]["pixels"])
    return tuple(int(value) for value in [*pixels.min(axis=0), *pixels.max(axis=0)])


@pytest.mark.parametrize("placed", [UTM, TURNED])
def test_every_object_once_and_exactly_on_earth(scene: Path, detect, tmp_path: Path, placed: dict) -> None:
    with rasterio.open(scene) as source:
        scene = write(tmp_path / "placed.tif", source.read(), **placed)
    features = detect(scene)
    assert sorted(map(envelope, features)) == sorted(OBJECTS)
    for feature in features:
        native = [placed["transform"] @ corner for corner in rectangles()[envelope(feature)]]
        expected = np.array(transform(placed["crs"], "EPSG:4326", *zip(*native, strict=True))).T
        assert np.allclose(sorted_rows(corners_of(feature)), sorted_rows(expected), rtol=0, atol=2e-9)
        assert feature["properties"]["phrase"] == "ship"
    longitude, latitude = corners_of(features[0]).T  # UTM zone 33: 500 km east is 15 degrees
    assert np.abs(longitude - 15).max() < 0.01
    assert np.abs(latitude - 48.75).max() < 0.01


def test_the_files_own_coordinates(scene: Path, detect, tmp_path: Path) -> None:
    features = detect(scene, "--crs", "native")
    for feature in features:
        expected = [UTM["transform"] @ corner for corner in rectangles()[envelope(feature)]]
        assert np.array_equal(sorted_rows(corners_of(feature)), sorted_rows(expected))
    collection = json.loads((tmp_path / "out" / "boxes.geojson").read_text())
    assert collection["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    # The ring runs counter-clockwise on the map.
    x, y = (corners_of(features[0]) - corners_of(features[0])[0]).T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0


@pytest.mark.parametrize("profile", [{}, {"transform": UTM["transform"]}])
def test_without_a_georeference_in_pixels(scene: Path, detect, tmp_path: Path, profile: dict, capsys) -> None:
    with rasterio.open(scene) as source:
        plain = write(tmp_path / "plain.tif", source.read(), **profile)
    for feature in detect(plain):
        assert np.array_equal(sorted_rows(corners_of(feature)), sorted_rows(rectangles()[envelope(feature)]))
    said = capsys.readouterr().err
    assert "no georeference: the coordinates are pixels" in said
    assert f"{len(OBJECTS)} objects" in said


def test_rows_and_overview(scene: Path, detect, tmp_path: Path) -> None:
    detect(scene)
    out = tmp_path / "out"
    rows = read_rows(out / "answers.jsonl")
    assert [row["name"] for row in rows] == [tile.name for tile in tile_scene(300, 260, 100, 0.25)]
    assert sum(len(row["boxes"]) for row in rows) > len(OBJECTS)
    assert sorted(p.name for p in out.iterdir()) == ["answers.jsonl", "boxes.geojson", "overview.png"]
    with Image.open(out / "overview.png") as overview:
        assert overview.width / overview.height == pytest.approx(300 / 260, rel=0.01)
    detect(scene)  # nothing is asked again
    assert read_rows(out / "answers.jsonl") == rows


def test_a_tile_of_the_models_size_and_a_real_model(scene: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--model-path", str(tiny_model), "--device", "cpu", "--image-file", str(scene), "--tile"]
    arguments += ["--prompt", "q", "--max-new-tokens", "3", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    rows = read_rows(tmp_path / "out" / "answers.jsonl")
    assert [row["name"] for row in rows] == [tile.name for tile in tile_scene(300, 260, 84, 0.25)]
    assert json.loads((tmp_path / "out" / "boxes.geojson").read_text())["features"] == []


def test_windows_are_the_pixels_of_the_file(scene: Path) -> None:
    with rasterio.open(scene) as source, open_scene(scene) as opened:
        pixels = source.read().transpose(1, 2, 0)
        assert (opened.width, opened.height, opened.limits) == (300, 260, None)
        assert np.array_equal(np.asarray(opened.read(Tile(60, 30, 100, 50))), pixels[30:80, 60:160])
        assert np.array_equal(np.asarray(opened.overview()), pixels)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_deep_samples_are_stretched_between_percentiles(tmp_path: Path, dtype: str, capsys, detect) -> None:
    ramp = np.linspace(200, 3200, 101 * 101).reshape(1, 101, 101)
    samples = np.concatenate([ramp, ramp + 500, ramp * 2]).astype(dtype)
    samples[:, 0, 0] = np.nan if dtype == "float32" else -1 if dtype == "int16" else 0
    file = write(tmp_path / "deep.tif", samples, nodata=None if dtype == "float32" else samples[0, 0, 0])
    with open_scene(file) as scene:
        low, high = np.percentile(samples[0].ravel()[1:], (2, 98))
        assert scene.limits[0] == pytest.approx((low, high))
        picture = np.asarray(scene.read(Tile(0, 0, 101, 101)))
    expected = ((samples.astype(float) - low) / (high - low) * 255).clip(0, 255)[0]
    assert np.abs(picture[:, :, 0].ravel()[1:] - expected.ravel()[1:]).max() <= 0.5
    assert (picture[0, 0] == 0).all()
    assert picture[50, 50].tolist() == pytest.approx([127] * 3, abs=2)
    detect(file)
    assert f"between the percentiles 2 and 98: {low:g} to {high:g}, " in capsys.readouterr().err


def test_an_even_deep_band_is_dark_not_an_error(tmp_path: Path) -> None:
    with open_scene(write(tmp_path / "even.tif", np.full((1, 9, 9), 7, np.uint16))) as scene:
        assert np.asarray(scene.read(Tile(0, 0, 9, 9))).max() == 0
    empty = write(tmp_path / "empty.tif", np.full((1, 9, 9), 7, np.uint16), nodata=7)
    with open_scene(empty) as scene:
        assert np.asarray(scene.overview()).max() == 0


def test_the_bands_that_the_file_calls_red_green_and_blue(tmp_path: Path) -> None:
    samples = np.arange(4, dtype=np.uint8)[:, None, None] * 50 + np.zeros((4, 8, 8), np.uint8)
    file = write(tmp_path / "bands.tif", samples, **UTM)
    with open_scene(file) as scene:
        assert scene.read(Tile(0, 0, 8, 8)).getpixel((0, 0)) == (0, 50, 100)
    with rasterio.open(file, "r+") as source:
        names = ("undefined", "blue", "green", "red")
        source.colorinterp = [rasterio.enums.ColorInterp[name] for name in names]
    with open_scene(file) as scene:
        assert scene.read(Tile(0, 0, 8, 8)).getpixel((0, 0)) == (150, 100, 50)
    with open_scene(write(tmp_path / "one.tif", samples[1:2])) as scene:
        assert scene.read(Tile(0, 0, 8, 8)).getpixel((0, 0)) == (50, 50, 50)


def test_a_palette_becomes_colours(tmp_path: Path) -> None:
    file = tmp_path / "palette.tif"
    Image.new("RGB", (16, 16), (250, 40, 30)).quantize(4).save(file)
    with open_scene(file) as scene:
        assert scene.read(Tile(0, 0, 16, 16)).getpixel((3, 3)) == (250, 40, 30)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_other_kinds_of_pictures_are_scenes_too(tmp_path: Path, suffix: str, recwarn) -> None:
    file = tmp_path / f"x.{suffix}"
    Image.new("RGB", (60, 40), (0, 200, 0)).save(file)
    with open_scene(file) as scene:
        assert scene.read(Tile(10, 10, 20, 20)).size == (20, 20)
        assert scene.coordinates(np.zeros((1, 2)), "wgs84") is None
    assert not recwarn.list
    assert not list(tmp_path.glob("*.xml"))


def test_a_damaged_part_is_a_recorded_failure(scene: Path, tmp_path: Path, refused, monkeypatch) -> None:
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    with rasterio.open(scene) as source:
        file = write(tmp_path / "damaged.tif", source.read(), **blocks, **UTM)
    with rasterio.open(file) as source:
        where = int(
            source.get_tag_item("BLOCK_OFFSET_4_3", "TIFF", bidx=1)
        )  # pixels 256 to 300, 192 to 256: no object
    content = bytearray(file.read_bytes())
    content[where : where + 20] = b"\xff" * 20
    file.write_bytes(content)
    monkeypatch.setattr(cli, "load_chat", lambda arguments: Seer())
    arguments = ["--model-path", "m", "--image-file", str(file), "--prompt", "q", "--tile", "100"]
    line = refused(cli.main, [*arguments, "--output", str(tmp_path / "out")])  # the overview cannot be drawn
    assert line.startswith(f"error: {file}: cannot be read")
    rows = read_rows(tmp_path / "out" / "answers.jsonl")
    assert {row["name"] for row in rows if row["error"]} == {"200,150,100,100", "200,160,100,100"}
    features = json.loads((tmp_path / "out" / "boxes.geojson").read_text())["features"]
    assert sorted(map(envelope, features)) == sorted(OBJECTS)  # seen whole in other tiles


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.tif", "image file not found"), ("text.tif", "cannot be read as a scene"), ("", "not found")],
)
def test_refusals_are_one_line(tmp_path: Path, refused, monkeypatch, name: str, message: str) -> None:
    monkeypatch.setattr(cli, "load_chat", lambda arguments: Seer())
    (tmp_path / "text.tif").write_text("no picture")
    arguments = ["--model-path", "m", "--tile", "100", "--prompt", "q", "--output", str(tmp_path / "out")]
    assert message in refused(cli.main, [*arguments, "--image-file", str(tmp_path / name)])


def test_without_rasterio_it_says_what_to_install(scene: Path, refused, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "load_chat", lambda arguments: Seer())
    monkeypatch.setitem(sys.modules, "rasterio", None)
    arguments = ["--model-path", "m", "--tile", "100", "--prompt", "q", "--output", str(tmp_path / "out")]
    assert "pip install 'geochat[geo]'" in refused(cli.main, [*arguments, "--image-file", str(scene)])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_the_whole_scene_is_never_in_memory(tmp_path: Path) -> None:
    """A scene of 1.2 GB, nearly all of it empty on disk, opens in a fraction of that."""
    file = tmp_path / "large.tif"
    options = {"tiled": True, "blockxsize": 512, "blockysize": 512, "sparse_ok": True, "compress": "deflate"}
    shape = {"count": 3, "height": 20_000, "width": 20_000, "dtype": "uint8"}
    with rasterio.open(file, "w", driver="GTiff", **shape, **options, **UTM):
        pass
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from geochat.data.tiles import Tile\n"
        "from geochat.serve.raster import open_scene\n"
        "with open_scene(Path(sys.argv[1])) as scene:\n"
        "    assert scene.read(Tile(19_000, 19_000, 504, 504)).size == (504, 504)\n"
        # getrusage's peak would be the test process's, which this one was forked from.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(peak.split()[1])\n"
    )
    environment = {**os.environ, "GDAL_CACHEMAX": "64"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 600 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
def test_nano_finds_the_objects_of_a_drawn_scene(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("scipy")
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "scene.py"
    words = ["--side", "1000", "--objects", "6", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    recall = re.search(r"^scene +6 +[0-9]+ +([0-9.]+)", said, re.MULTILINE)
    assert recall is not None, said
    assert float(recall[1]) > 25
    gap = re.search(r"at most ([0-9.e+-]+) pixels away", said)
    assert gap is not None, said
    assert float(gap[1]) < 0.02
