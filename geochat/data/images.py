"""Opening pictures: one reader for training, chat, evaluation and the linter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

MAX_PIXELS = 178_956_970
"""Pictures above this are refused unread (Pillow's own bound for a decompression bomb)."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Kinds of picture that are read. Others that Pillow knows start programs (EPS) or hold no 8-bit picture."""

_DEEP_MODES = ("I", "F")  # 16- and 32-bit samples: "I;16", "I;16B", "I", "F"

# What is refused is said in one line of our own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").addHandler(logging.NullHandler())


def open_image(source: str | Path | BinaryIO | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, wholly decoded, in the orientation it is stored in.

    Transparency is dropped, never composited: colours under transparent pixels stay, as in LLaVA and GeoChat.
    EXIF orientation is not applied, because boxes in the training files refer to the stored pixels.
    Of several frames or pages the first is read.

    Args:
        max_pixels: larger pictures are refused; default `MAX_PIXELS`.

    Raises:
        ValueError: the file and the reason: missing, empty, truncated, not an image, too large, or with
            more than 8 bits per sample (which RGB could only clip).
    """
    max_pixels = max_pixels or MAX_PIXELS
    if isinstance(source, Image.Image):
        return _rgb(source, "image", max_pixels)
    with _opened(source, max_pixels) as (image, name):
        return _rgb(image, name, max_pixels)


def image_size(source: str | Path, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height as the file states them, without decoding it. Raises: ValueError, as `open_image`."""
    max_pixels = max_pixels or MAX_PIXELS
    with _opened(source, max_pixels) as (image, name):
        _check_size(image, name, max_pixels)
        return image.size


@contextmanager
def _opened(source: str | Path | BinaryIO, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """The picture, not yet decoded, and its name; what goes wrong with it inside becomes a ValueError."""
    name = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "image"))
    bound = Image.MAX_IMAGE_PIXELS
    if max_pixels > MAX_PIXELS and bound is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with Image.open(source, formats=FORMATS) as image:
            yield image, name
    except FileNotFoundError:
        raise ValueError(f"{name}: image file not found") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: {_why_unknown(source)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused, {error}") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        # Pillow's decoders raise a dozen types on damaged files, RuntimeError among them.
        raise ValueError(f"{name}: cannot be read as an image: {' '.join(str(error).split())}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _why_unknown(source: str | Path | BinaryIO) -> str:
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            start = file.read(2)
    else:
        source.seek(0)
        start = source.read(2)
    if not start:
        return "the file is empty"
    if start in (b"II", b"MM"):
        return "a TIFF whose bands or samples are not those of an 8-bit picture"
    return "not an image file"


class _Refused(ValueError):
    """A picture that could be read, but is not wanted; the message names it already."""


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _Refused(f"{name}: refused, {width} x {height} pixels is above {max_pixels}")


def _is_deep(image: ImageFile) -> bool:
    """Whether the file has 16-bit samples of which Pillow would keep the upper half: darkness, where 12 bits are used."""
    if isinstance(image, TiffImageFile) and max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8:
        return True
    return any(";16" in str(tile.args) for tile in image.tile)


def _rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    if image.mode.startswith(_DEEP_MODES) or (isinstance(image, ImageFile) and _is_deep(image)):
        raise _Refused(f"{name}: more than 8 bits per sample ({image.mode}); convert it to 8-bit RGB")
    image.load()
    if "transparency" in image.info:
        # Pillow keeps this entry through convert(), and some image processors act on it.
        image = image.copy()
        del image.info["transparency"]
    return image.copy() if image.mode == "RGB" else image.convert("RGB")
