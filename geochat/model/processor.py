"""The one preprocessing for training, chat and evaluation: pixels, tokenizer and chat template of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from geochat.data.encode import Encoder
from geochat.data.sample import IMAGE_TOKEN
from geochat.data.templates import Template, get_template
from geochat.data.words import by_words
from geochat.model.tokenizer import load_tokenizer, write_tokenizer_files
from geochat.model.vision import grid_side
from geochat.model.weights import read_json

# OpenAI's CLIP, as in openai/clip-vit-large-patch14-336.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)
"""int(255 * CLIP_MEAN): what LLaVA and GeoChat put around an image that is not square."""

PAD_TOKEN = "<pad>"
MAX_TEXT_TOKENS = 2048
_STRIP = 1 << 24  # pixels of a tall picture that are padded at a time
ImageMode = Literal["pad", "crop"]


@dataclass
class Processor:
    """Everything that turns pictures and turns into what the model takes."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    image_size: int
    """Side of the square the tower sees, in pixels."""
    patch_size: int
    image_token_id: int
    pad_token_id: int
    image_mode: ImageMode = "pad"
    """"pad" to a square with the CLIP mean (training, chat), or "crop" the centre (GeoChat's evaluation scripts)."""
    sentencepiece: bytes | None = None
    """Content of `tokenizer.model` where the checkpoint has one; it travels along for other tools."""

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes in the language model."""
        return grid_side(self.image_size, self.patch_size) ** 2

    @property
    def own_tokens(self) -> int:
        """Tokens of the tokenizer without `<image>` and `<pad>` where geochat put them at the end."""
        count = len(self.tokenizer)
        while count - 1 in (self.image_token_id, self.pad_token_id):
            count -= 1
        return count

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """[3, image_size, image_size] float32, CLIP-normalised.

        Bit-identical to transformers' LlavaImageProcessor with `do_pad` on its Pillow backend, and so to GeoChat's
        `expand2square` and CLIPImageProcessor. Transparency is dropped, never composited, as LLaVA does.
        """
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.width == 0 or image.height == 0:
            raise ValueError(f"an image of {image.width} x {image.height} pixels has nothing to see")
        square = _padded if self.image_mode == "pad" else _cropped
        planes = np.asarray(square(image, self.image_size))
        pixels = np.empty((3, self.image_size, self.image_size), dtype=np.float32)
        for channel, table in enumerate(_normalised_levels()):
            np.take(table, planes[:, :, channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)

    def encoder(self, max_text_tokens: int = MAX_TEXT_TOKENS, truncate: bool = False) -> Encoder:
        """The encoder of conversations with this tokenizer, template and number of image tokens."""
        backend = self.tokenizer.backend_tokenizer
        special = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        encode_text: Callable[[str], list[int]] = _EncodeText(self.tokenizer)
        if isinstance(backend.model, BPE) and backend.pre_tokenizer is None:
            encode_text = by_words(encode_text, self.tokenizer.get_vocab())
        return Encoder(
            encode_text,
            self.template,
            bos_id=self.tokenizer.bos_token_id,
            special_ids=special,
            image_token_id=self.image_token_id,
            image_tokens=self.image_tokens,
            max_text_tokens=max_text_tokens,
            truncate=truncate,
        )

    def with_image_size(self, image_size: int) -> Processor:
        """The same processor at another resolution."""
        grid_side(image_size, self.patch_size)
        return replace(self, image_size=image_size)

    def with_template(self, name: str) -> Processor:
        """The same processor with the chat template of this name."""
        return replace(self, template=get_template(name))

    @classmethod
    def load(cls, folder: Path | str) -> Processor:
        """From a checkpoint folder; needs no other file than those `save` writes. Raises ValueError."""
        folder = Path(folder)
        layout = read_json(folder / "processor_config.json", optional=True)
        images = layout.get("image_processor") or read_json(
            folder / "preprocessor_config.json", optional=True
        )
        tokenizer = load_tokenizer(folder)
        image_token_id = tokenizer.backend_tokenizer.token_to_id(IMAGE_TOKEN)
        if image_token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no {IMAGE_TOKEN} token")
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no padding token")
        spm = folder / "tokenizer.model"
        return cls(
            tokenizer=tokenizer,
            template=_read_template(folder, tokenizer),
            image_size=_side(images.get("crop_size", images.get("size")), folder),
            patch_size=layout.get("patch_size") or 14,
            image_token_id=image_token_id,
            pad_token_id=tokenizer.pad_token_id,
            image_mode="pad" if images.get("do_pad") else "crop",
            sentencepiece=spm.read_bytes() if spm.exists() else None,
        )

    def save(self, folder: Path | str) -> None:
        """Files that `Processor.load` and transformers' `AutoProcessor` read: images, template and tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layout = {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": self.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        }
        images = {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": self.image_mode == "pad",
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        }
        _write_json(folder / "processor_config.json", layout)
        _write_json(folder / "preprocessor_config.json", images)
        (folder / "chat_template.jinja").write_text(self.template.jinja, encoding="utf-8")
        write_tokenizer_files(folder, self.tokenizer, self.sentencepiece, MAX_TEXT_TOKENS)


class _EncodeText:
    """Text -> ids without BOS; picklable, so that an encoder can travel to loader processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=1)
def _normalised_levels() -> tuple[np.ndarray, ...]:
    """For each channel the float32 value of every grey level, in the arithmetic of transformers' image transforms."""
    levels = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    return tuple(
        (levels - np.float32(mean)) / np.float32(std) for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)
    )


def _padded(image: Image.Image, side: int) -> Image.Image:
    """Centred on a square of the CLIP mean (an odd remainder goes to the right or bottom), then resized."""
    width, height = image.size
    if width == height:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    # Pillow resizes the columns first, row by row; doing so before the padding (of rows), or strip by strip (with
    # padded columns), spares the whole square, which could be 30 000 pixels wide. Same pixels.
    longest = max(width, height)
    square = Image.new("RGB", (side, longest), PAD_COLOUR)
    if width > height:
        image = image.resize((side, height), Image.Resampling.BICUBIC)
        square.paste(image, (0, (longest - height) // 2))
    else:
        rows = max(1, _STRIP // longest)
        for top in range(0, height, rows):
            strip = Image.new("RGB", (longest, min(rows, height - top)), PAD_COLOUR)
            strip.paste(image.crop((0, top, width, top + strip.height)), ((longest - width) // 2, 0))
            square.paste(strip.resize((side, strip.height), Image.Resampling.BICUBIC), (0, top))
    return square.resize((side, side), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """Shorter edge resized to `side`, centre cut out."""
    shortest = min(image.size)
    # The ends of a ribbon, resized, could fill the memory, and would be cut off.
    x, y = (max(0, edge // 2 - 32 * shortest) for edge in image.size)
    if x or y:
        image = image.crop((x, y, image.width - x, image.height - y))
    width, height = (side if edge == shortest else int(side * edge / shortest) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _read_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template that travels with the checkpoint: one of ours when the text is the same, else as it is."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        text = jinja.read_text(encoding="utf-8")
    else:  # older files keep it inside a JSON file
        for name in ("chat_template.json", "tokenizer_config.json"):
            text = read_json(folder / name, optional=True).get("chat_template", "")
            if text:
                break
        else:
            raise ValueError(f"{folder}: has no chat template (chat_template.jinja)")
    return Template.from_jinja(text, stop=(tokenizer.eos_token,))


def _side(size: Any, folder: Path) -> int:
    """The side in pixels from an entry of preprocessor_config.json, of which there are three spellings."""
    if isinstance(size, int):
        return size
    if isinstance(size, dict) and size:
        return int(size.get("height") or size["shortest_edge"])
    raise ValueError(f"{folder}: preprocessor_config.json states no image size")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
