"""What llama.cpp's files say of a model besides its tensors: sizes, vocabulary, template, pictures.

Keys and their meaning: src/llama-arch.cpp, src/llama-vocab.cpp and tools/mtmd/clip-impl.h of llama.cpp.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from geochat.model.formats.gguf import FEATURES, TEXT_FIELDS, TOWER_FIELDS, gguf_template
from geochat.model.formats.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED, SentencePieceModel
from geochat.model.processor import CLIP_MEAN, CLIP_STD, Processor
from geochat.model.tokenizer import require_plain_bpe

_ADDED_SCORE = -1000.0  # below every piece: an added token is never the result of merging two others
Vocabulary = list[tuple[str, float, int]]


def feature_layers(config: LlavaConfig) -> list[int]:
    """Hidden states that the projector sees, counted from 0 (the embeddings) up."""
    layers = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers
    return [i if i >= 0 else count + 1 + i for i in ([layers] if isinstance(layers, int) else layers)]


def vocabulary(processor: Processor, where: str) -> Vocabulary:
    """Text, score and type of every token but those that geochat added at the end.

    Raises ValueError for a tokenizer that llama.cpp's would not follow.
    """
    assert processor.sentencepiece is not None
    model = SentencePieceModel.parse(processor.sentencepiece, f"{where}: its tokenizer.model")
    require_plain_bpe(model, f"{where}: its tokenizer.model")
    if not model.byte_fallback:
        raise ValueError(
            f"{where}: cannot be written as GGUF: llama.cpp needs a tokenizer with byte fallback"
        )
    backend = processor.tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    found: Vocabulary = []
    for i in range(processor.own_tokens):
        text = backend.id_to_token(i)
        piece = model.pieces[i] if i < len(model.pieces) else None
        if piece is None or piece[0] != text:
            if i not in added:
                raise ValueError(f"{where}: token {i} is {text!r}, which its tokenizer.model does not have")
            piece = (text, _ADDED_SCORE, NORMAL)
        kind = piece[2]
        if i in added and kind in (NORMAL, UNUSED):
            kind = CONTROL if added[i].special else USER_DEFINED
        found.append((text, piece[1], kind))
    return found


def text_metadata(config: LlavaConfig, processor: Processor, pieces: Vocabulary) -> dict[str, Any]:
    """Of the language model, with its vocabulary. `eot` is the template's stop token where it is not the tokenizer's."""
    text, tokenizer = config.text_config, processor.tokenizer
    model = SentencePieceModel.parse(processor.sentencepiece or b"", "tokenizer.model")
    rope = text.rope_parameters or {}
    facts: dict[str, Any] = {key: getattr(text, field) for key, field in TEXT_FIELDS}
    facts |= {
        "general.type": "model",
        "llama.vocab_size": len(pieces),
        "llama.attention.key_length": text.head_dim,
        "llama.attention.value_length": text.head_dim,
        "llama.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.unknown_token_id": model.unk_id,
        "tokenizer.ggml.padding_token_id": model.unk_id,  # geochat's own is cut off; nothing reads it
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        "tokenizer.chat_template": gguf_template(processor.template.jinja),
    }
    if rope.get("rope_type") == "linear":
        facts |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(rope["factor"])}
    stops = [tokenizer.backend_tokenizer.token_to_id(stop) for stop in processor.template.stop]
    ends = [i for i in stops if i not in (None, tokenizer.eos_token_id)]
    return facts | ({"tokenizer.ggml.eot_token_id": ends[0]} if ends else {})


def tower_metadata(config: LlavaConfig) -> dict[str, Any]:
    """Of the tower and the projector."""
    vision = config.vision_config
    return {
        **{key: getattr(vision, field) for key, field in TOWER_FIELDS},
        "general.type": "mmproj",
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act == "gelu",  # else the quick one
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.image_mean": list(CLIP_MEAN),
        "clip.vision.image_std": list(CLIP_STD),
        FEATURES: feature_layers(config),
    }
