"""Write LLaVA's original layout: what GeoChat's and LLaVA's own programs read, and SGLang.

The folder holds everything in one: language model, projector and vision tower under the original names, the tokenizer
without the rows that geochat adds, and the tower once more as a CLIP folder of its own at the model's resolution, since
those programs build the tower from such a folder first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from geochat.model.build import stored_dtype
from geochat.model.canonical import expected_shapes, rename
from geochat.model.formats.llava import CLIP, LLAVA
from geochat.model.processor import CLIP_MEAN, CLIP_STD, MAX_TEXT_TOKENS, Processor
from geochat.model.staging import staged
from geochat.model.weights import (
    MAX_SHARD_BYTES,
    Entry,
    State,
    assert_same_keys,
    open_weights,
    write_json,
    write_weights,
)

TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_COPIED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "initializer_range",
)  # fmt: skip


def write_llava(
    folder: Path | str,
    config: LlavaConfig,
    state: State,
    processor: Processor,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: str | None = None,
    progress: bool = False,
) -> None:
    """Write the original layout from an unread canonical table, one tensor in memory at a time, atomically.

    resume, progress: as in `geochat.model.checkpoint.write_checkpoint`.
    Raises ValueError: the model has no sentencepiece tokenizer, biases that the layout does not know, or the folder
    cannot be written.
    """
    folder = Path(folder)
    if processor.sentencepiece is None:
        raise ValueError(
            f"{folder}: the original layout needs a tokenizer.model, which this model does not have"
        )
    if config.text_config.attention_bias:
        raise ValueError(f"{folder}: the original layout knows no attention biases")
    assert_same_keys(state, expected_shapes(config), f"{folder} (to be written)")
    rows = processor.own_tokens
    dtype = dtype or stored_dtype(config)
    tower = f"clip-vit-patch{config.vision_config.patch_size}-{processor.image_size}"
    original = {key: entry.to(dtype) for key, entry in original_state(state, rows).items()}
    with staged(folder / tower) as staging:
        clip = {key: entry.to(dtype) for key, entry in clip_state(state).items()}
        write_weights(staging, clip, max_shard_bytes, str(folder / tower) if progress else None)
        vision = {**config.vision_config.to_dict(), "architectures": ["CLIPVisionModel"]}
        write_json(staging / "config.json", {**vision, "torch_dtype": _name(dtype)})
        write_json(staging / "preprocessor_config.json", _clip_images(processor.image_size))
    with staged(folder, resume) as staging:
        write_weights(staging, original, max_shard_bytes, str(folder) if progress else None)
        write_json(staging / "config.json", _config(config, rows, folder / tower, dtype))
        write_json(
            staging / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        )
        _write_tokenizer(staging, processor)
        written = {key: entry.shape for key, entry in open_weights(staging).items()}
        assert_same_keys(original, written, f"{folder} (as written)")


def original_state(state: State, rows: int) -> State:
    """LLaVA's names for a canonical table; the vocabulary cut to the tokenizer's own `rows`."""
    found: State = {}
    for key, entry in state.items():
        name = rename(key, LLAVA, backwards=True)
        assert name is not None, key
        found[name] = first_rows(entry, rows) if key in TABLES else entry
    return found


def clip_state(state: State) -> State:
    """The tower alone, under the names of a CLIP folder."""
    return {
        CLIP[0][0] + key.removeprefix(CLIP[0][1]): entry
        for key, entry in state.items()
        if key.startswith(CLIP[0][1])
    }


def first_rows(entry: Entry, rows: int) -> Entry:
    """A [V, C] table cut to its first rows, still unread."""
    return entry.map(lambda table: table[:rows].clone(), (rows, entry.shape[1]))


def _config(config: LlavaConfig, rows: int, tower: Path, dtype: torch.dtype) -> dict[str, Any]:
    text = config.text_config
    rope = dict(text.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    geochat = config.vision_config.image_size == 504
    return {
        **{name: getattr(text, name) for name in _COPIED},
        "vocab_size": rows,
        "rope_theta": theta,
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False, "use_cache": True, "torch_dtype": _name(dtype),
        "architectures": ["GeoChatLlamaForCausalLM" if geochat else "LlavaLlamaForCausalLM"],
        "model_type": "geochat" if geochat else "llava",
        "mm_vision_tower": str(tower.absolute()),
        "mm_vision_select_layer": config.vision_feature_layer, "mm_vision_select_feature": "patch",
        "mm_hidden_size": config.vision_config.hidden_size, "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "unfreeze_mm_vision_tower": True,
    }  # fmt: skip


def _clip_images(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor", "crop_size": size, "do_center_crop": True, "do_normalize": True,
        "do_resize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "resample": 3, "size": size,
    }  # fmt: skip


def _write_tokenizer(folder: Path, processor: Processor) -> None:
    assert processor.sentencepiece is not None
    (folder / "tokenizer.model").write_bytes(processor.sentencepiece)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "model_max_length": MAX_TEXT_TOKENS,
         "padding_side": "right", "add_bos_token": True, "add_eos_token": False, **roles},
    )  # fmt: skip
    write_json(folder / "special_tokens_map.json", roles)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
