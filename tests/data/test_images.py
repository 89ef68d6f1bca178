"""Opening images: what is kept, and what is refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def png(colour_type: int, bits: int, size: tuple[int, int], row: bytes) -> bytes:
    """A PNG file out of its parts; `row` is one row of samples."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * min(size[1], 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour_type", "samples"), [(2, 3), (6, 4), (4, 2), (0, 1)])
def test_deep_colour_png_is_refused_not_darkened(tmp_path: Path, colour_type: int, samples: int):
    path = tmp_path / "x.png"
    path.write_bytes(png(colour_type, 16, (4, 4), b"\x0f\xff" * samples * 4))
    with pytest.raises(ValueError, match=r"x\.png: more than 8 bits per sample"):
        open_image(path)


def tiff(bits: int, samples: int, planar: int) -> bytes:
    """A little-endian TIFF of 4 x 4 pixels, uncompressed, in one strip or one for each band."""
    strips = samples if planar == 2 else 1
    size = 16 * bits // 8 * samples // strips
    entries = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, samples, 200), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, strips, 300 if strips > 1 else 400), (277, 3, 1, samples), (278, 3, 1, 4)]
    entries += [(279, 4, strips, 340 if strips > 1 else size), (284, 3, 1, planar)]
    content = bytearray(b"II*\0" + struct.pack("<IH", 8, len(entries)))
    content += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    content = content.ljust(400 + 16 * samples * bits // 8, b"\x7f")
    content[200 : 200 + 2 * samples] = struct.pack("<H", bits) * samples
    for i in range(strips):
        content[300 + 4 * i : 304 + 4 * i] = struct.pack("<I", 400 + i * size)
        content[340 + 4 * i : 344 + 4 * i] = struct.pack("<I", size)
    return bytes(content)


@pytest.mark.parametrize("planar", [1, 2])
def test_deep_colour_tiff_is_refused_not_misread(tmp_path: Path, planar: int):
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(8, 3, planar))
    assert np.asarray(open_image(path)).mean() == 0x7F
    path.write_bytes(tiff(16, 3, planar))
    with pytest.raises(ValueError, match=r"x\.tif: more than 8 bits per sample"):
        open_image(path)


def test_a_tiff_of_many_bands_says_so(tmp_path: Path, capfd):
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(16, 13, 1))
    with pytest.raises(ValueError, match=r"x\.tif: a TIFF whose bands or samples are not those"):
        open_image(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("side", [10_000, 30_000, 2**31 - 1])
def test_decompression_bombs_are_refused_unread(tmp_path: Path, side: int):
    path = tmp_path / "x.png"
    path.write_bytes(png(2, 8, (side, 20_000), b"\0"))
    with pytest.raises(ValueError, match=r"x\.png: refused, "):
        open_image(path)


def test_a_long_picture_opens(tmp_path: Path):
    path = tmp_path / "x.png"
    Image.new("L", (30_000, 4_000), 90).save(path, compress_level=1)
    assert open_image(path).size == (30_000, 4_000)


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path):
    path = tmp_path / "x.png"
    picture = noise("RGB").quantize(8)
    picture.save(path, transparency=bytes(range(0, 256, 32)))
    assert (np.asarray(open_image(path)) == np.asarray(picture.convert("RGB"))).all()


def test_cmyk_is_not_a_negative(tmp_path: Path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK").save(path, quality=95)
    assert np.abs(np.asarray(open_image(path), int) - (220, 30, 40)).max() < 12


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_frame_is_read(tmp_path: Path, suffix: str):
    path = tmp_path / f"x.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (np.asarray(open_image(path)) == (255, 0, 0)).all()


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "x.eps"
    Image.new("RGB", (9, 9)).save(path)
    with pytest.raises(ValueError, match=r"x\.eps: not an image file"):
        open_image(path)


def encoded(suffix: str) -> bytes:
    stream = io.BytesIO()
    noise(size=(24, 24)).save(stream, suffix)
    return stream.getvalue()


DAMAGED = {kind: encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")}


@given(
    st.sampled_from(sorted(DAMAGED)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
)
def test_a_damaged_file_is_a_picture_or_one_line(kind: str, changes: list[tuple[int, int]]):
    content = bytearray(DAMAGED[kind])
    for place, value in changes:
        content[place % len(content)] = value
    image, reason = None, ""
    try:
        image = open_image(io.BytesIO(bytes(content)), max_pixels=1 << 20)
    except ValueError as error:
        reason = str(error)
    assert image.mode == "RGB" if image else reason.startswith("image: ") and "\n" not in reason


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
    with pytest.raises(ValueError, match="the file is empty"):
        open_image(io.BytesIO())


def test_the_golden_images_open(assets: Path):
    for path in sorted((assets / "golden" / "images").iterdir()):
        assert open_image(path).mode == "RGB"
