"""Opening pictures: one reader for training, chat, evaluation and the linter."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image

MAX_PIXELS = 178_956_970
"""Pictures above this are refused unread (Pillow's own bound for a decompression bomb)."""

_DEEP_MODES = ("I", "F")  # 16- and 32-bit samples: "I;16", "I;16B", "I", "F"


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """Read a picture as 8-bit RGB, wholly decoded, in the orientation it is stored in.

    Transparency is dropped, never composited: colours under transparent pixels stay, as in LLaVA and GeoChat.
    EXIF orientation is not applied, because boxes in the training files refer to the stored pixels.

    Raises:
        ValueError: the file and the reason: missing, empty, truncated, not an image, too large, or with
            more than 8 bits per sample (which RGB could only clip).
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "image")
    name = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "image"))
    try:
        with Image.open(source) as image:
            return _rgb(image, name)
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


class _Refused(ValueError):
    """A picture that could be read, but is not wanted; the message names it already."""


def _rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Refused(f"{name}: refused, {width} x {height} pixels is above {MAX_PIXELS}")
    if image.mode.startswith(_DEEP_MODES):
        raise _Refused(f"{name}: mode {image.mode} has more than 8 bits per sample; convert it to 8-bit RGB")
    image.load()
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if rgb is image:
        rgb = image.copy()
    # Pillow keeps this entry through convert(), and some image processors act on it.
    rgb.info.pop("transparency", None)
    return rgb
