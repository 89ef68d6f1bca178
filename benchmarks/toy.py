"""A random model in the proportions of GeoChat-7B at 504 px, and pictures to ask about: for the benchmarks of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from geochat.chat.engine import Chat, Request
from geochat.chat.sampling import Settings
from geochat.data.images import open_image
from geochat.model.processor import Processor

SIDE, PATCH = 504, 14
NANO = Path(__file__).resolve().parents[1] / "playground" / "nano"


def build(hidden: int, layers: int, seed: int) -> tuple[LlavaForConditionalGeneration, Processor]:
    """1,296 image tokens, a tower that does a twentieth of the work, a small output layer; nano's tokenizer."""
    torch.manual_seed(seed)
    processor = Processor.load(NANO).with_image_size(SIDE)
    vision = CLIPVisionConfig(
        hidden_size=hidden // 4,
        intermediate_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=max(1, hidden // 256),
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        initializer_range=0.1,  # far from ties
        eos_token_id=None,  # answers end with their budget
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
    return LlavaForConditionalGeneration(config).eval(), processor


def draw_pictures(folder: Path, count: int, random: np.random.Generator) -> list[Path]:
    """PNG files of 512 x 512 pixels, as RSVQA-HR's are."""
    files = [folder / f"{i}.png" for i in range(count)]
    for file in files:
        coarse = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(file)
    return files


@torch.inference_mode()
def from_scratch(chat: Chat, request: Request, tokens: int) -> list[int]:
    """New tokens as the original programs get them: the picture is read, transformed and seen, the whole prompt computed."""
    ids = torch.from_numpy(chat.row(request, Settings()).prompt.ids.astype(np.int64))[None]
    output = chat.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.stack([chat.processor.pixels(open_image(picture)) for picture in request.images]),
        generation_config=greedy(chat, tokens),
    )
    return output[0, ids.shape[1] :].tolist()


def greedy(chat: Chat, tokens: int) -> GenerationConfig:
    """Exactly this many tokens, chosen as `chat` chooses them."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=chat.processor.pad_token_id,
        suppress_tokens=chat._silent,
    )


def endless(model: LlavaForConditionalGeneration, processor: Processor) -> Chat:
    """A chat of which nothing is known yet, and whose answers end with their budget alone."""
    chat = Chat(model, processor)
    chat._stops = []
    return chat


class Work:
    """What the linear layers have computed, in multiply-adds times two."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.flops = 0
        self._model = model

    @contextmanager
    def counted(self) -> Iterator[None]:
        def count(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            self.flops += 2 * module.weight.numel() * inputs[0].numel() // inputs[0].shape[-1]

        linears = [module for module in self._model.modules() if isinstance(module, torch.nn.Linear)]
        hooks = [module.register_forward_hook(count) for module in linears]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
