"""The options by which every command names a model, and the model they name."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from geochat.chat.engine import Chat


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """LLaVA's flag names, and what decides how pictures and prompts are prepared."""
    parser.add_argument("--model-path", type=Path, required=True, help="merged or adapter folder")
    parser.add_argument("--model-base", type=Path, help="base of an adapter, where not the recorded one")
    parser.add_argument("--vision-tower", type=Path, help="CLIP folder, where the model folder has none")
    parser.add_argument("--conv-mode", help="chat template; default: the checkpoint's")
    parser.add_argument("--image-mode", choices=("pad", "crop"), help="default: the checkpoint's")
    parser.add_argument(
        "--image-size", type=int, help="default: the checkpoint's; else the table is resampled"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (extra: quant)")
    parser.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (extra: quant)")


def load_chat(arguments: argparse.Namespace) -> Chat:
    """The model that the options name. Raises ValueError with the reason when it cannot be read."""
    chat = Chat.load(
        arguments.model_path,
        arguments.model_base,
        device=arguments.device,
        load_4bit=arguments.load_4bit,
        load_8bit=arguments.load_8bit,
        vision_tower=arguments.vision_tower,
        image_size=arguments.image_size,
    )
    processor = chat.processor
    if arguments.conv_mode:
        processor = processor.with_template(arguments.conv_mode)
    if arguments.image_mode:
        processor = replace(processor, image_mode=arguments.image_mode)
    return chat if processor is chat.processor else Chat(chat.model, processor)
