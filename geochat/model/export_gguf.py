"""Write llama.cpp's two files: the language model, and `mmproj` with the tower and the projector.

What llama.cpp expects is taken from its reader (src/models/llama.cpp, tools/mtmd/clip.cpp), not from its converters,
which know neither GeoChat's resolution nor llava-hf's CLIP.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlavaConfig

from geochat.model.build import stored_dtype
from geochat.model.canonical import expected_shapes
from geochat.model.export import TABLES, first_rows
from geochat.model.formats.gguf import gguf_name, pairs_together
from geochat.model.formats.gguf_file import open_gguf, package
from geochat.model.gguf_metadata import feature_layers, text_metadata, tower_metadata, vocabulary
from geochat.model.processor import Processor
from geochat.model.staging import staged
from geochat.model.weights import Entry, State, assert_same_keys

# dtype -> its name in file names, its tensor type, its "general.file_type".
_DTYPES = {
    torch.float32: ("f32", 0, 0),
    torch.float16: ("f16", 1, 1),
    torch.bfloat16: ("bf16", 30, 32),
}
_PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"


def write_gguf(
    folder: Path | str,
    config: LlavaConfig,
    state: State,
    processor: Processor,
    *,
    dtype: torch.dtype | None = None,
    resume: str | None = None,
    progress: bool = False,
) -> None:
    """Write `model-<dtype>.gguf` and `mmproj-<dtype>.gguf` from an unread canonical table, atomically.

    One tensor is in memory at a time. Vectors stay float32, as llama.cpp wants them. The vocabulary is cut to the
    tokenizer's own rows. dtype: None: as stored; float32, float16 or bfloat16. resume, progress: as in
    `geochat.model.checkpoint.write_checkpoint`.
    Raises ValueError: the package gguf is absent, llama.cpp could not run the model, or it cannot be written.
    """
    folder = Path(folder)
    dtype = dtype or stored_dtype(config)
    _require_expressible(folder, config, processor, dtype)
    gguf = package()
    shapes = expected_shapes(config)
    assert_same_keys(state, shapes, f"{folder} (to be written)")
    pieces = vocabulary(processor, str(folder))
    text, name = config.text_config, _DTYPES[dtype][0]
    tensors: dict[str, State] = {"model": {}, "mmproj": {}}
    for key in shapes:
        entry = _rounded(key, state[key], dtype)
        if key in TABLES:
            entry = first_rows(entry, len(pieces))
        entry = pairs_together(key, entry, text.num_attention_heads, text.num_key_value_heads)
        stored = gguf_name(key)
        if stored is None:
            raise ValueError(f"{folder}: {key} has no name in GGUF")
        tensors["model" if key.startswith("language_model.") else "mmproj"][stored] = entry
    metadata = {
        "model": text_metadata(config, processor, pieces),
        "mmproj": tower_metadata(config),
    }
    title = str(folder) if progress else None
    bar = tqdm(total=len(shapes), desc=title, unit="tensor", disable=title is None, leave=False)
    with staged(folder, resume) as staging, bar:
        for part, architecture in (("model", "llama"), ("mmproj", "clip")):
            file = staging / f"{part}-{name}.gguf"
            facts = {**metadata[part], "general.file_type": _DTYPES[dtype][2]}
            if file.exists():  # written whole before a kill
                bar.update(len(tensors[part]))
            else:
                _write(gguf, file, architecture, facts, tensors[part], bar.update)
            wanted = {stored: entry.shape for stored, entry in tensors[part].items()}
            assert_same_keys(open_gguf(file).tensors, wanted, f"{folder} (as written)")


def _require_expressible(folder: Path, config: LlavaConfig, processor: Processor, dtype: torch.dtype) -> None:
    """Raise ValueError that names the first thing llama.cpp's Llama, CLIP or projector cannot do."""
    text, vision = config.text_config, config.vision_config
    layers = feature_layers(config)
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    wrong = {
        "this model has no tokenizer.model": processor.sentencepiece is None,
        f"dtype {dtype}": dtype not in _DTYPES,
        f"a language model of type {text.model_type}": text.model_type != "llama",
        f"hidden_act {text.hidden_act} in the language model": text.hidden_act != "silu",
        # "dynamic" changes nothing up to the context length, beyond which the file does not allow to go.
        f"rope scaling {rope}": rope not in ("default", "linear", "dynamic"),
        f"hidden_act {vision.hidden_act} in the tower": vision.hidden_act not in ("quick_gelu", "gelu"),
        f"a projector with {config.projector_hidden_act}": config.projector_hidden_act != "gelu",
        "a projector without biases": not config.multimodal_projector_bias,
        "features with the class token": config.vision_feature_select_strategy != "default",
        # clip.cpp takes the features in the order of depth, each once.
        f"vision_feature_layer {config.vision_feature_layer}": any(a >= b for a, b in pairwise(layers)),
    }
    for what, true in wrong.items():
        if true:
            raise ValueError(f"{folder}: cannot be written as GGUF: {what} has no place in it")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds another checkpoint; name a folder of its own for the GGUF files")


def _rounded(key: str, entry: Entry, dtype: torch.dtype) -> Entry:
    if len(entry.shape) < 2 or (key == _PATCHES and dtype is torch.bfloat16):
        # ggml convolves with a float32 or float16 kernel only.
        return entry.to(torch.float32)
    return entry.to(dtype)


def add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    """Each value under the type that llama.cpp reads it as: whole numbers as uint32, others by their own."""
    kinds = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
    }  # fmt: skip
    for key, value in metadata.items():
        kinds.get(type(value), writer.add_array)(key, value)


def _write(
    gguf: Any,
    file: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: State,
    progress: Callable[[], object],
) -> None:
    """One file: names, shapes and types first, then each tensor as it is read. It has its name when it is whole."""
    partial = file.with_name(f"{file.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    add_metadata(writer, metadata)
    for name, entry in tensors.items():
        kind = gguf.GGMLQuantizationType(_DTYPES[entry.dtype][1])
        plain = np.dtype(f"i{entry.dtype.itemsize}")  # the type is stated apart, numpy has no bfloat16
        writer.add_tensor_info(name, entry.shape, plain, entry.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in tensors.values():
            bits = entry.read().detach().cpu().contiguous()
            writer.write_tensor_data(bits.view(torch.int32 if bits.itemsize == 4 else torch.int16).numpy())
            progress()
        writer.flush()
        for stream in writer.fout:
            os.fsync(stream.fileno())  # a power cut must not leave a renamed file without its data
    finally:
        writer.close()
    partial.replace(file)
