"""Opening images: what is kept, and what is refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geochat.data import images
from geochat.data.images import image_size, open_image


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    planes = np.random.default_rng(0).integers(0, 256, (4, size[1], size[0]), dtype=np.uint8)
    bands = [Image.fromarray(plane) for plane in planes[: len(Image.new(mode, (1, 1)).getbands())]]
    return Image.merge(mode, bands)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    path = tmp_path / "x.tif"
    noise(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (40, 30)


def test_transparency_is_dropped_not_composited(tmp_path: Path):
    path = tmp_path / "x.png"
    pixels = np.array(noise("RGBA"))
    pixels[:, :, 3] = 0
    Image.fromarray(pixels).save(path)
    assert (np.asarray(open_image(path)) == pixels[:, :, :3]).all()


def test_no_transparency_entry_survives(tmp_path: Path):
    path = tmp_path / "x.png"
    noise("RGB").quantize(8).save(path, transparency=0)
    assert "transparency" in Image.open(path).info
    assert "transparency" not in open_image(path).info


def test_the_stored_orientation_stays(tmp_path: Path):
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(path, exif=exif)
    assert open_image(path).size == (40, 30)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, share: float):
    path = tmp_path / f"x.{suffix}"
    noise(size=(200, 200)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=f"x.{suffix}: "):
        open_image(path)


@pytest.mark.parametrize(("content", "reason"), [(b"", "the file is empty"), (b"hello", "not an image file")])
def test_files_that_are_no_images(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.png: {reason}"):
        open_image(path)


def test_a_missing_file_and_a_folder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"x\.png: image file not found"):
        open_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match=tmp_path.name):
        open_image(tmp_path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused(tmp_path: Path, mode: str):
    path = tmp_path / "x.tif"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(ValueError, match="more than 8 bits per sample"):
        open_image(path)


def test_huge_images_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    path = tmp_path / "x.png"
    noise().save(path)
    with pytest.raises(ValueError, match=r"x\.png: refused, 40 x 30 pixels"):
        open_image(path)
    assert open_image(path, max_pixels=1200).size == (40, 30)
    with pytest.raises(ValueError, match=r"x\.png: refused, 40 x 30 pixels is above 1199"):
        image_size(path, max_pixels=1199)
    # Pillow's own bound rises with it, and falls back.
    bound = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x\.png: refused"):
        image_size(path)
    assert image_size(path, max_pixels=1200) == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100 != bound


def test_the_size_is_read_from_the_header(tmp_path: Path):
    path = tmp_path / "x.png"
    noise(size=(200, 100)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert image_size(path) == (200, 100)
    with pytest.raises(ValueError, match=r"y\.png: image file not found"):
        image_size(tmp_path / "y.png")


def test_open_files_and_images_are_taken_too():
    stream = io.BytesIO()
    noise().save(stream, "PNG")
    stream.seek(0)
    assert (np.asarray(open_image(stream)) == np.asarray(noise())).all()
    original = noise()
    assert open_image(original) is not original
    assert open_image(noise("L")).mode == "RGB"
    with pytest.raises(ValueError, match="not an image file"):
        open_image(io.BytesIO(b"hello"))


def test_the_golden_images_open(assets: Path):
    for path in sorted((assets / "golden" / "images").iterdir()):
        assert open_image(path).mode == "RGB"
