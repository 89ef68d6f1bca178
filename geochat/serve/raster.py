"""A scene on disk, such as a GeoTIFF: windows of it as pictures, and where its pixels lie on Earth.

Needs rasterio (the extra `geo`). Only the windows that are asked for, and a small overview, are in memory.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from geochat.data.tiles import Tile

PERCENTILES = (2.0, 98.0)
"""Of each band: what becomes black and white where samples have more than 8 bits."""
OVERVIEW = 2048
"""Longer side of the overview, in pixels."""

Crs = Literal["wgs84", "native"]

logging.getLogger("rasterio").addHandler(
    logging.NullHandler()
)  # what goes wrong is said in one line of our own


class Scene:
    """An open raster. Use `open_scene`."""

    def __init__(self, path: Path, source: Any) -> None:
        self.path, self._source = path, source
        self.width: int = source.width
        self.height: int = source.height
        self.bands = _colour_bands(source)
        self._palette = _palette(source)
        kinds = {source.dtypes[band - 1] for band in self.bands}
        if any(kind.startswith("complex") for kind in kinds):
            raise ValueError(f"{path}: complex samples are no picture")
        self.limits = None if kinds == {"uint8"} else _limits(self._overview)
        """Lowest and highest value shown of each band, float64 [bands, 2]; None for 8-bit samples, shown as they are."""

    def read(self, tile: Tile) -> Image.Image:
        """A window as RGB. Raises ValueError when the file is damaged there."""
        from rasterio.windows import Window

        return self._picture(self._read(window=Window(tile.left, tile.top, tile.width, tile.height)))

    def overview(self) -> Image.Image:
        """The whole scene as RGB, every n-th pixel, the longer side at most `OVERVIEW`."""
        return self._picture(self._overview)

    def coordinates(self, pixels: np.ndarray, crs: Crs) -> np.ndarray | None:
        """Pixels [n, 2] as longitude and latitude (WGS84), or in the file's own system; None without a georeference.

        Raises ValueError when the points have no place in WGS84.
        """
        if self._source.transform.is_identity or (crs == "wgs84" and self._source.crs is None):
            return None
        a, b, c, d, e, f, *_ = self._source.transform
        native = pixels @ np.array([(a, d), (b, e)]) + (c, f)
        if crs == "native":
            return native
        from rasterio.errors import RasterioError
        from rasterio.warp import transform

        try:
            placed = np.array(transform(self._source.crs, "EPSG:4326", *native.T.tolist())).T
        except RasterioError as error:
            raise ValueError(f"{self.path}: cannot be placed in WGS84 ({error}); use --crs native") from None
        if not np.isfinite(placed).all():
            raise ValueError(f"{self.path}: leaves the range of its projection; use --crs native")
        return placed.round(9)  # a tenth of a millimetre

    @property
    def crs_name(self) -> str | None:
        """Name of the file's own system, as GeoJSON writers state it."""
        crs = self._source.crs
        if crs is None:
            return None
        code = crs.to_epsg()
        return f"urn:ogc:def:crs:EPSG::{code}" if code else crs.to_wkt()

    @cached_property
    def _overview(self) -> np.ma.MaskedArray:
        scale = min(1.0, OVERVIEW / max(self.width, self.height))
        size = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        return self._read(out_shape=(len(self.bands), *size))

    def _read(self, **options: Any) -> np.ma.MaskedArray:
        from rasterio.errors import RasterioError

        try:
            return self._source.read(self.bands, masked=True, **options)
        except RasterioError as error:
            raise ValueError(f"{self.path}: cannot be read ({error})") from None

    def _picture(self, samples: np.ma.MaskedArray) -> Image.Image:
        """[bands, height, width] of any kind → RGB; what the file marks as empty becomes black."""
        levels = np.nan_to_num(samples.filled(0))
        if self.limits is not None:
            low, high = self.limits[:, 0, None, None], self.limits[:, 1, None, None]
            levels = ((levels - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)
            levels[np.ma.getmaskarray(samples)] = 0
        if self._palette is not None:
            return Image.fromarray(self._palette[levels[0]])
        return Image.fromarray(np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0).copy())


@contextmanager
def open_scene(path: Path) -> Iterator[Scene]:
    """Raises ValueError: rasterio is not installed, or the file cannot be read."""
    try:
        import rasterio
    except ImportError:
        raise ValueError("tiling a scene needs rasterio: pip install 'geochat[geo]'") from None
    if not path.is_file():
        raise ValueError(f"{path}: image file not found")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            source = rasterio.open(path)
        except rasterio.errors.RasterioError as error:
            raise ValueError(f"{path}: cannot be read as a scene ({error})") from None
    with source:
        if not source.count:
            raise ValueError(f"{path}: holds no bands, only other data sets; name one of them")
        yield Scene(path, source)


def _colour_bands(source: Any) -> list[int]:
    """Numbers of the bands that are red, green and blue by what the file says, else of the first three, or of one."""
    said = [interpretation.name for interpretation in source.colorinterp]
    if {"red", "green", "blue"} <= set(said):
        return [said.index(name) + 1 for name in ("red", "green", "blue")]
    return [1, 2, 3] if source.count >= 3 and "palette" not in said else [1]


def _palette(source: Any) -> np.ndarray | None:
    """Colours [256, 3] of a scene whose samples are numbers of colours."""
    if source.colorinterp[0].name != "palette" or source.dtypes[0] != "uint8":
        return None
    colours = np.zeros((256, 3), np.uint8)
    for number, colour in source.colormap(1).items():
        colours[number] = colour[:3]
    return colours


def _limits(samples: np.ma.MaskedArray) -> np.ndarray:
    """`PERCENTILES` of each band, float64 [bands, 2], apart even where a band has one value."""
    limits = []
    for band in samples:
        valid: Sequence[float] = band.compressed()[np.isfinite(band.compressed())]
        low, high = np.percentile(valid, PERCENTILES) if len(valid) else (0.0, 1.0)
        limits.append((low, high if high > low else low + 1))
    return np.array(limits)
