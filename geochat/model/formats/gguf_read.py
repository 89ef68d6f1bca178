"""A model from llama.cpp's two files: the language model with its vocabulary, the tower with its projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from geochat.model.formats.gguf import (
    FEATURES,
    POST_NORM,
    TEXT_FIELDS,
    TOWER_FIELDS,
    canonical_name,
    pairs_together,
)
from geochat.model.formats.gguf_file import GgufFile, open_gguf
from geochat.model.formats.sentencepiece import BPE_MODEL, BYTE, UNKNOWN, SentencePieceModel
from geochat.model.weights import State, of_tensor


class TextPart(NamedTuple):
    """The language model of a file."""

    config: dict[str, Any]
    """As a config.json of a Llama folder has it."""
    state: State
    vocabulary: SentencePieceModel
    chat_template: str | None
    stops: tuple[str, ...]


class SightPart(NamedTuple):
    """The tower and projector of an `mmproj` file."""

    config: dict[str, Any]
    """As the config.json of a CLIP vision folder has it."""
    state: State
    feature_layer: int | list[int]


def read_text(file: Path) -> TextPart:
    """A Llama with a sentencepiece vocabulary. Raises ValueError, naming the file, for any other model."""
    found = open_gguf(file)
    _require_llama(found)
    for fact, what in (
        ("llama.expert_count", "a mixture of experts"),
        ("split.count", "one of several parts"),
    ):
        if found.metadata.get(fact):
            raise ValueError(f"{file}: {what}, which is not read")
    config = _text_config(found)
    state: State = {}
    for name, entry in found.tensors.items():
        key = canonical_name(name)
        if key is None or not key.startswith("language_model."):
            raise ValueError(f"{file}: unknown tensor {name}; it is no plain Llama")
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        state[key] = pairs_together(key, entry, heads, kv_heads, backwards=True)
    config["attention_bias"] = any(key.endswith("q_proj.bias") for key in state)
    config["mlp_bias"] = any(key.endswith("up_proj.bias") for key in state)
    config["tie_word_embeddings"] = "language_model.lm_head.weight" not in state
    embeddings = state.get("language_model.model.embed_tokens.weight")
    if embeddings is None:
        raise ValueError(f"{file}: has no token_embd.weight")
    config["torch_dtype"] = str(embeddings.dtype).removeprefix("torch.")
    vocabulary = _vocabulary(found)
    if len(vocabulary.pieces) != embeddings.shape[0]:
        raise ValueError(f"{file}: {len(vocabulary.pieces)} tokens, but embeddings of {embeddings.shape[0]}")
    ids = [found.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eot", "eos")]
    stops = tuple(vocabulary.pieces[i][0] for i in dict.fromkeys(ids) if isinstance(i, int))
    return TextPart(config, state, vocabulary, found.metadata.get("tokenizer.chat_template"), stops)


def _require_llama(found: GgufFile) -> None:
    kind = found.get("general.architecture", str)
    if kind != "llama":
        raise ValueError(
            f"{found.path}: a {kind} model; of GGUF language models only Llama's architecture is read"
        )


def _text_config(found: GgufFile) -> dict[str, Any]:
    heads = found.get("llama.attention.head_count", int)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": found.get("llama.embedding_length", int) // heads,
        "vocab_size": len(found.get("tokenizer.ggml.tokens", list)),
    }
    config = {
        field: found.get(key, float if field == "rms_norm_eps" else int, defaults.get(field))
        for key, field in TEXT_FIELDS
    }
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        if found.get(key, int, config["head_dim"]) != config["head_dim"]:
            raise ValueError(
                f"{found.path}: {key} differs from llama.rope.dimension_count, which is not read"
            )
    config["rope_theta"] = found.get("llama.rope.freq_base", float, 10000.0)
    scaling = found.get("llama.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{found.path}: rope scaling {scaling!r} is not read")
    if scaling == "linear":
        factor = found.get("llama.rope.scaling.factor", float)
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config | {"model_type": "llama", "hidden_act": "silu"}


def _vocabulary(found: GgufFile) -> SentencePieceModel:
    kind = found.get("tokenizer.ggml.model", str)
    if kind != "llama":
        raise ValueError(f"{found.path}: its tokenizer is {kind!r}; only sentencepiece's ('llama') is read")
    lists = [found.get(f"tokenizer.ggml.{name}", list) for name in ("tokens", "scores", "token_type")]
    if len({len(values) for values in lists}) != 1 or len(set(lists[0])) != len(lists[0]):
        raise ValueError(f"{found.path}: its tokens, scores and types do not fit each other")
    kinds = lists[2]
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    model = SentencePieceModel(
        pieces=list(zip(*lists, strict=True)),
        model_type=BPE_MODEL,
        byte_fallback=BYTE in kinds,
        add_dummy_prefix=found.get("tokenizer.ggml.add_space_prefix", bool, True),
        remove_extra_whitespaces=False,
        unk_id=found.get("tokenizer.ggml.unknown_token_id", int, unknown),
        bos_id=found.get("tokenizer.ggml.bos_token_id", int, 1),
        eos_id=found.get("tokenizer.ggml.eos_token_id", int, 2),
    )
    if max(model.unk_id, model.bos_id, model.eos_id) >= len(model.pieces):
        raise ValueError(f"{found.path}: its special tokens lie beyond the vocabulary")
    return model


def read_sight(file: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> SightPart:
    """A CLIP tower and a two-layer projector; `mean` and `std` of the pixels are what the caller can do.

    Raises ValueError, naming the file, for any other tower or projector.
    """
    found = open_gguf(file)
    kind = found.get("general.architecture", str)
    projector = found.metadata.get("clip.projector_type", found.metadata.get("clip.vision.projector_type"))
    if kind != "clip" or projector != "mlp":
        raise ValueError(
            f"{file}: no mmproj of LLaVA-1.5's kind (architecture {kind}, projector {projector}; clip and mlp are read)"
        )
    if found.metadata.get("clip.vision.image_grid_pinpoints") or found.metadata.get("clip.use_silu"):
        raise ValueError(f"{file}: takes pictures in tiles or is no CLIP tower, which is not read")
    for fact, own in (("clip.vision.image_mean", mean), ("clip.vision.image_std", std)):
        if any(abs(a - b) > 1e-3 for a, b in zip(found.get(fact, list), own, strict=False)):
            raise ValueError(f"{file}: {fact} is not CLIP's, which is not supported")
    config: dict[str, Any] = {
        field: found.get(key, float if field == "layer_norm_eps" else int) for key, field in TOWER_FIELDS
    }
    config["hidden_act"] = "gelu" if found.metadata.get("clip.use_gelu") else "quick_gelu"
    layers = found.metadata.get(FEATURES) or [
        config["num_hidden_layers"]
    ]  # older files hold no layer after it
    first = found.tensors.get("v.blk.0.ffn_down.weight")
    swapped = first is None or first.shape[-1] == config["hidden_size"]  # clip.cpp's own rule
    state: State = {}
    for name, entry in found.tensors.items():
        key = canonical_name(name, swapped)
        if key is None or key.startswith("language_model."):
            raise ValueError(f"{file}: unknown tensor {name}; it is no CLIP tower with a two-layer projector")
        state[key] = entry
    for part, value in (("weight", torch.ones), ("bias", torch.zeros)):  # a file of llama.cpp's leaves it out
        state.setdefault(POST_NORM + part, of_tensor(value(config["hidden_size"])))
    # -2 rather than 23 of 24, as the configurations of the family count
    one = layers[0] - config["num_hidden_layers"] - 1 if len(layers) == 1 else None
    return SightPart(config, state, layers if one is None else one)


def text_file(path: Path) -> Path:
    """The language model's file of a folder, or the file named. Raises ValueError when there are several, or none."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    texts = [found for found in map(open_gguf, files) if found.get("general.architecture", str) != "clip"]
    if len(texts) > 1:
        names = ", ".join(found.path.name for found in texts)
        raise ValueError(f"{path}: holds several language models ({names}); name one file")
    if not texts:
        raise ValueError(
            f"{path}: a tower with its projector; name the language model's file, with this one beside it"
        )
    _require_llama(texts[0])
    return texts[0].path


def sights_beside(file: Path) -> list[Path]:
    """The `mmproj` files in the folder of a GGUF file, but for that file itself."""
    others = [other for other in sorted(file.parent.glob("*.gguf")) if other != file]
    return [other for other in others if open_gguf(other).get("general.architecture", str) == "clip"]


def sight_beside(text: Path) -> Path | None:
    """The `mmproj` file in the folder of a language model's file. Raises ValueError when there are several."""
    sights = sights_beside(text)
    if len(sights) > 1:
        names = ", ".join(file.name for file in sights)
        raise ValueError(f"{text.parent}: holds several towers ({names}); give one with --vision-tower")
    return sights[0] if sights else None
