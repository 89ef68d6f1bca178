"""What a language model brings along to be joined with a tower; from GGUF, perhaps the tower itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from geochat.data.templates import TEMPLATES, Template
from geochat.model.formats.gguf import gguf_template
from geochat.model.formats.gguf_read import read_sight, read_text, sight_beside, text_file
from geochat.model.processor import CLIP_MEAN, CLIP_STD, Processor
from geochat.model.tokenizer import tokenizer_of
from geochat.model.weights import State


class LanguageModel(NamedTuple):
    source: dict[str, Any]
    """As in a config.json."""
    state: State
    """Under canonical names; with a tower and a projector where they came along."""
    tokenizer: PreTrainedTokenizerFast
    sentencepiece: bytes | None
    inside: CLIPVisionConfig | None
    """Of a tower that came along with its configuration."""


def read_gguf(llm: Path, beside: bool = True) -> LanguageModel:
    """A GGUF file of a Llama, or the one in a folder, and what the `mmproj` file `beside` it holds. Raises ValueError."""
    text = text_file(llm)
    source, state, vocabulary, *_ = read_text(text)
    sight = sight_beside(text) if beside else None
    inside = see_with(sight, source, state) if sight else None
    return LanguageModel(source, state, tokenizer_of(vocabulary, str(text)), vocabulary.serialise(), inside)


def see_with(sight: Path, source: dict[str, Any], state: State) -> CLIPVisionConfig:
    """Put the tower, projector and feature layer of an `mmproj` file in the place of the language model's own."""
    config, tensors, layer = read_sight(sight, CLIP_MEAN, CLIP_STD)
    state |= tensors
    source["mm_vision_select_layer"] = layer
    return CLIPVisionConfig(**config)


def with_own_template(processor: Processor, llm: Path) -> Processor:
    """The processor with the chat template of a GGUF file, where it has one: one of ours when the text is the same."""
    part = read_text(text_file(llm))
    if not part.chat_template:
        return processor
    for known in TEMPLATES.values():
        if gguf_template(known.jinja) == part.chat_template:
            return replace(processor, template=known)
    template = Template.from_jinja(part.chat_template, stop=part.stops)
    return replace(processor, template=template)
