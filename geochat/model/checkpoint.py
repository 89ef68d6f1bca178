"""Read and write checkpoint folders: canonical folders, and adapter folders on the base they name.

A canonical folder loads in plain transformers, vLLM and older tools. It is written by our own writer, because
transformers' `save_pretrained` changes key layouts and token ids in ordinary situations.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from geochat.model.build import generation_config, read_config, stored_dtype
from geochat.model.canonical import (
    CANONICAL,
    canonical_state,
    expected_shapes,
    instantiate,
    model_state,
    untie,
)
from geochat.model.formats.gguf_read import sights_beside
from geochat.model.processor import Processor
from geochat.model.staging import recover, staged
from geochat.model.vision import grid_side, require_image_size, resample_positions, resize_config
from geochat.model.weights import (
    MAX_SHARD_BYTES,
    State,
    assert_same_keys,
    open_file,
    open_files,
    open_weights,
    write_json,
    write_weights,
)

__all__ = [
    "CANONICAL",
    "fingerprint",
    "load",
    "read_checkpoint",
    "save_model",
    "write_checkpoint",
]

_EMBEDDINGS = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"
_POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
_SAMPLES = 16  # values at the start, middle and end of each tensor that enter a fingerprint


def load(
    path: Path | str,
    *,
    base: Path | str | None = None,
    vision_tower: Path | str | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    quantization: str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Any, Processor]:
    """Model (in eval mode) and processor of a folder; what the folder is, is read from its files.

    path: a folder of any layout that `geochat.model.open` knows. An adapter of this project comes back as PEFT's
        model on its base; other programs' adapters come back merged.
    base: for an adapter, the base model where it is not the one the adapter names.
    vision_tower: CLIP folder of a model that does not hold its tower.
    image_size: resample the position table when the file has another; None: as in the file, 504 for GeoChat's own.
    dtype: None: as stored. device: "cpu", "cuda", "cuda:1", … or "auto".
    quantization: None, "4bit" or "8bit" (language model only).
    Raises ValueError: unreadable or unknown folder, tensors missing or left over, an adapter on the wrong base.
    """
    path = Path(path)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "quantization": quantization,
        "attn_implementation": attn_implementation,
    }
    if path.is_dir():
        recover(path)
    if (path / "geochat_base.json").exists():
        from geochat.model.adapter import load_with_base

        return load_with_base(path, base, image_size=image_size, vision_tower=vision_tower, **options)
    from geochat.model.open import open_model

    config, state, processor = open_model(path, base=base, vision_tower=vision_tower, image_size=image_size)
    model = instantiate(config, state, str(path), **{**options, "dtype": dtype or stored_dtype(config)})
    model.generation_config = _read_generation_config(path, config, processor)
    return model, processor


def read_checkpoint(path: Path, image_size: int | None = None) -> tuple[LlavaConfig, State, Processor]:
    """Configuration, unread canonical weights and processor of a canonical folder, at `image_size` if given."""
    source = read_config(path)
    config = LlavaConfig.from_dict(source)
    state = canonical_state(open_weights(path))
    tied = source.get("tie_word_embeddings") or source["text_config"].get("tie_word_embeddings")
    if tied and _HEAD not in state and _EMBEDDINGS in state:
        state[_HEAD] = state[_EMBEDDINGS]  # a checkpoint of another program
    untie(config)
    processor = Processor.load(path)
    if image_size is not None and image_size != config.vision_config.image_size:
        side = grid_side(image_size, config.vision_config.patch_size)
        table = state[_POSITIONS].to(torch.float32)  # resampled before it is rounded
        state[_POSITIONS] = table.map(
            lambda rows: resample_positions(rows, side), (1 + side * side, table.shape[1])
        )
        resize_config(config, image_size)
        processor = processor.with_image_size(image_size)
    require_image_size(config, processor.image_size)
    return config, state, processor


def save_model(
    model: LlavaForConditionalGeneration,
    processor: Processor,
    folder: Path | str,
    *,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a canonical folder, atomically; an existing one is replaced, other files in it stay.

    state: the gathered parameters under the model's own names, where the model is sharded (ZeRO-3, FSDP).
    dtype: round to this dtype; None: as the model holds them.
    Raises ValueError for a quantised or PEFT model, and when the folder cannot be written.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "a quantised model cannot be saved: its weights are rounded; merge into the full base"
        )
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ValueError(f"{type(model).__name__} is no plain Llava model; save adapters with save_adapter")
    weights = model_state(model, state)
    write_checkpoint(folder, model.config, weights, processor, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_checkpoint(
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
    """Write a canonical folder from an unread table, one tensor in memory at a time; see `save_model`.

    resume: key of what is written (`geochat.model.weights.resume_key`): shards of an earlier call with the same key that
    was killed are kept. progress: show a bar by tensor.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds an adapter; save the full model in a folder of its own")
    require_image_size(config, processor.image_size)
    config = LlavaConfig.from_dict(config.to_dict())
    untie(config)
    shapes = expected_shapes(config)
    assert_same_keys(state, shapes, f"{folder} (to be written)")
    ordered = {key: state[key].to(dtype) for key in shapes}
    with staged(folder, resume) as staging:
        write_weights(staging, ordered, max_shard_bytes, str(folder) if progress else None)
        write_json(staging / "config.json", portable_config(config, ordered[_EMBEDDINGS].dtype))
        generation = generation_config(config, processor).to_diff_dict()
        write_json(staging / "generation_config.json", generation)
        processor.save(staging)
        assert_same_keys(open_weights(staging), shapes, f"{folder} (as written)")


def portable_config(config: LlavaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for transformers 4.5x and 5.x, vLLM and SGLang: each reads other names of the same fields."""
    value = config.to_dict()
    value["architectures"] = ["LlavaForConditionalGeneration"]
    for name in ("_name_or_path", "quantization_config", "_attn_implementation_autoset"):
        value.pop(name, None)
    for part in (value, value["text_config"], value["vision_config"]):
        part["dtype"] = part["torch_dtype"] = str(dtype).removeprefix("torch.")
    text = value["text_config"]
    rope = dict(text.get("rope_parameters") or {})
    if rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return value


def fingerprint(folder: Path | str) -> str:
    """A short hash of the weights in a folder or file: names, shapes and a few values of every tensor. Of an adapter
    folder, of the adapter's own tensors; of a GGUF file, with those of the `mmproj` beside it.

    Does not depend on how the tensors are spread over files or whether these are pickles or safetensors.
    Reads some kilobytes per tensor, so it is cheap on a 7B model too.
    """
    path = Path(folder)
    if (path / "adapter_config.json").exists():
        state = open_files(sorted([*path.glob("adapter_model.*"), *path.glob("non_lora_trainables.*")]))
    elif path.suffix == ".gguf":
        state = open_files([path, *sights_beside(path)])
    else:
        state = open_weights(path) if path.is_dir() else open_file(path)
    digest = hashlib.sha256()
    for key in sorted(state):
        entry = state[key]
        count = math.prod(entry.shape)
        digest.update(f"{key}{list(entry.shape)}".encode())
        for first in sorted({0, count // 2, max(count - _SAMPLES, 0)}):
            digest.update(entry.values(first, min(first + _SAMPLES, count)).double().numpy().tobytes())
    return digest.hexdigest()[:32]


def _read_generation_config(path: Path, config: LlavaConfig, processor: Processor) -> GenerationConfig:
    if (path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(str(path), local_files_only=True)
    return generation_config(config, processor)
