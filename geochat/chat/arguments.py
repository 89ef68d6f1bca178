"""The options by which every command names a model, and the model they name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.data.templates import get_template

LOCAL = (
    "model_base",
    "vision_tower",
    "conv_mode",
    "image_mode",
    "image_size",
    "device",
    "load_4bit",
    "load_8bit",
)
"""Options that an endpoint's own command decides."""


def template_name(text: str) -> str:
    """Argument type: a chat template that exists."""
    try:
        return get_template(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number(least: float, most: float = math.inf, whole: bool = False) -> Callable[[str], float]:
    """Argument type: a number from `least` to `most`."""

    def parse(text: str) -> float:
        value = int(text) if whole else float(text)  # their ValueError becomes argparse's own line
        if not least <= value <= most:
            bound = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {bound}")
        return value

    parse.__name__ = "whole number" if whole else "number"
    return parse


def add_model_arguments(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """LLaVA's flag names, and what decides how pictures and prompts are prepared; or a server's address.

    With `default`, a folder, the command can do without naming a model.
    """
    model = parser.add_mutually_exclusive_group(required=default is None)
    model.add_argument("--model-path", type=Path, default=default, help="merged or adapter folder")
    model.add_argument("--endpoint", help="or: address of an OpenAI-compatible server, http://host:port/v1")
    parser.add_argument("--endpoint-model", help="model's name there; default: the only one it lists")
    parser.add_argument("--model-base", type=Path, help="base of an adapter, where not the recorded one")
    parser.add_argument("--vision-tower", type=Path, help="CLIP folder, where the model folder has none")
    parser.add_argument("--conv-mode", type=template_name, help="chat template; default: the checkpoint's")
    parser.add_argument("--image-mode", choices=("pad", "crop"), help="default: the checkpoint's")
    parser.add_argument(
        "--image-size", type=int, help="default: the checkpoint's; else the table is resampled"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (extra: quant)")
    parser.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (extra: quant)")


def load_chat(arguments: argparse.Namespace) -> Any:
    """The model that the options name: a `Chat`, or a `RemoteChat`, which answers the same calls.

    Raises ValueError with the reason when it cannot be read or reached.
    """
    if arguments.endpoint:
        return _remote(arguments)
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


def _remote(arguments: argparse.Namespace) -> RemoteChat:
    given = [name for name in LOCAL if getattr(arguments, name) not in (None, False, "auto")]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names}: for a model of this machine, not of an --endpoint")
    return RemoteChat(arguments.endpoint, arguments.endpoint_model)
