"""Opening pictures: one reader for training, chat, evaluation and the linter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

MAX_PIXELS = 178_956_970
"""Pictures above this are refused unread (Pillow's own bound for a decompression bomb)."""

_DEEP_MODES = ("I", "F")  # 16- and 32-bit samples: "I;16", "I;16B", "I", "F"


def open_image(source: str | Path | BinaryIO | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, wholly decoded, in the orientation it is stored in.

    Transparency is dropped, never composited: colours under transparent pixels stay, as in LLaVA and GeoChat.
    EXIF orientation is not applied, because boxes in the training files refer to the stored pixels.

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
        with Image.open(source) as image:
            yield image, name
    except FileNotFoundError:
        raise ValueError(f"{name}: image file not found") from None
    except Image.UnidentifiedImageError:
        empty = isinstance(source, (str, Path)) and Path(source).stat().st_size == 0
        raise ValueError(f"{name}: {'the file is empty' if empty else 'not an image file'}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused, {error}") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        # Pillow's decoders raise a dozen types on damaged files, RuntimeError among them.
        raise ValueError(f"{name}: cannot be read as an image: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = bound


class _Refused(ValueError):
    """A picture that could be read, but is not wanted; the message names it already."""


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _Refused(f"{name}: refused, {width} x {height} pixels is above {max_pixels}")


def _rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    if image.mode.startswith(_DEEP_MODES):
        raise _Refused(f"{name}: mode {image.mode} has more than 8 bits per sample; convert it to 8-bit RGB")
    image.load()
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if rgb is image:
        rgb = image.copy()
    # Pillow keeps this entry through convert(), and some image processors act on it.
    rgb.info.pop("transparency", None)
    return rgb
