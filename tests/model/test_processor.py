"""Pixels bit-identical to the originals and to transformers; processor files that transformers reads."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geochat.data.sample import Sample, Turn
from geochat.model.build import read_parts
from geochat.model.processor import Processor

SIZES = [(84, 84), (50, 90), (91, 50), (300, 199), (1, 7), (500, 20), (391, 3)]


@pytest.fixture
def processor(tiny_llm: Path, tiny_clip: Path) -> Processor:
    return read_parts(tiny_llm, tiny_clip, image_size=84)[2]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(("expected", "size"), [("geochat/pixels_504", 504), ("llava/pixels_336", 336)])
def test_golden_pixels(assets: Path, processor: Processor, expected: str, size: int) -> None:
    golden = assets / "golden"
    sized = processor.with_image_size(size)
    for name, row in json.loads((golden / f"expected/{expected}.json").read_text()).items():
        with Image.open(golden / "images" / name) as image:
            pixels = sized.pixels(image)
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == row["sha256_float32"], name


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_transformers(processor: Processor, tmp_path: Path, mode: str, size) -> None:
    from transformers import AutoImageProcessor

    processor.image_mode = mode
    processor.save(tmp_path)
    try:
        theirs = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    except ImportError:
        pytest.skip("this transformers needs torchvision for its image processors")
    image = noise(*size)
    assert torch.equal(processor.pixels(image), theirs(image, return_tensors="pt").pixel_values[0])


def test_a_tall_picture_padded_in_strips_has_the_same_pixels(processor: Processor, monkeypatch) -> None:
    whole = processor.pixels(noise(30, 400))
    monkeypatch.setattr("geochat.model.processor._STRIP", 9_000)  # 22 rows, and a remainder
    assert torch.equal(processor.pixels(noise(30, 400)), whole)


@pytest.mark.parametrize("size", [(30_000, 2), (2, 3_000)])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_ribbon_does_not_fill_the_memory(processor: Processor, mode: str, size: tuple[int, int]) -> None:
    processor.image_mode = mode
    ends = Image.new("RGB", size, (255, 0, 0))
    middle = tuple(slice(edge // 2 - 5, edge // 2 + 5) for edge in reversed(size))
    pixels = np.array(ends)
    pixels[middle] = (0, 255, 0)
    seen = processor.pixels(Image.fromarray(pixels))
    assert torch.isfinite(seen).all()
    red, green = seen[:2, 42, 42]
    assert (green > red + 1) if mode == "crop" else abs(green - red) < 0.1


def test_transparency_is_dropped_not_composited(processor: Processor) -> None:
    image = noise(60, 40, "RGBA")
    plain = Image.merge("RGB", image.split()[:3])
    assert torch.equal(processor.pixels(image), processor.pixels(plain))
    palette = plain.quantize(8)
    palette.info["transparency"] = 0
    assert torch.equal(processor.pixels(palette), processor.pixels(palette.convert("RGB")))
    grey = noise(60, 40, "L")
    assert torch.equal(processor.pixels(grey), processor.pixels(Image.merge("RGB", [grey] * 3)))


def test_pixels_are_plain_float32(processor: Processor) -> None:
    pixels = processor.pixels(noise(84, 84))
    assert pixels.shape == (3, 84, 84)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()


def test_plain_transformers_reads_the_files(processor: Processor, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    processor.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    plain = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many  ships?"}]}
    text = plain.apply_chat_template([message], add_generation_prompt=True)
    image = noise(90, 50)
    theirs = plain(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    turns = [Turn("user", "<image>\nHow many  ships?")]
    assert theirs.input_ids[0].tolist() == processor.encoder().encode_prompt(turns).tolist()
    assert torch.equal(theirs.pixel_values[0], processor.pixels(image))


def test_round_trip(processor: Processor, tmp_path: Path) -> None:
    for changed in (processor, processor.with_image_size(126), processor.with_template("plain")):
        changed.save(tmp_path)
        again = Processor.load(tmp_path)
        assert (again.image_size, again.patch_size, again.image_mode) == (changed.image_size, 14, "pad")
        assert again.template == changed.template
        assert again.image_tokens == (changed.image_size // 14) ** 2
        assert (again.image_token_id, again.pad_token_id) == (changed.image_token_id, changed.pad_token_id)
        assert again.sentencepiece == changed.sentencepiece


def test_encoder_reproduces_golden_ids_and_labels(assets: Path) -> None:
    golden = assets / "golden"
    clip = golden / "clip-vit-tiny-patch14-336"
    processor = read_parts(golden / "geochat_tiny", clip)[2]
    encoder = pickle.loads(pickle.dumps(processor.encoder()))
    for row in json.loads((golden / "expected/geochat/conversations.json").read_text()):
        encoded = encoder.encode(Sample.from_record(row))
        ids, labels = [], []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            image = token == -200
            ids += [processor.image_token_id] * 1296 if image else [token]
            labels += [label] * (1296 if image else 1)
        assert encoded.input_ids.tolist() == ids
        assert encoded.labels.tolist() == labels


def test_broken_folders_are_named(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Processor.load(tmp_path)
    processor.save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="states no image size"):
        Processor.load(tmp_path)
    with pytest.raises(ValueError, match="no multiple of the tower's patch size"):
        processor.with_image_size(100)
