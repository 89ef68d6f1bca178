"""The canonical key layout (llava-hf) and the one place where a model object is made from weights.

transformers renames keys between releases and writes layouts that other tools cannot read, so names on disk are ours:
`language_model.model.*`, `language_model.lm_head.weight`, `multi_modal_projector.*`, `vision_tower.vision_model.*`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from geochat.model.weights import State, assert_same_keys, of_tensor

KeyTable = tuple[tuple[str, str], ...]

# (prefix in the running model, prefix on disk), read forwards when saving and backwards when loading.
CANONICAL: KeyTable = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)
# Buffers that older releases stored; they follow from the configuration.
DERIVED_BUFFERS = ("rotary_emb.inv_freq", "position_ids")

# What bitsandbytes must leave alone; the names are those of the running model, matched from the start.
NOT_QUANTISED = ("lm_head", "model.vision_tower", "model.multi_modal_projector")


def rename(key: str, table: KeyTable, backwards: bool = False) -> str | None:
    """The key under the other name, or None when no row of the table covers it."""
    for left, right in table:
        old, new = (right, left) if backwards else (left, right)
        if key.startswith(old):
            return new + key[len(old) :]
    return None


def canonical_key(key: str) -> str:
    """The name on disk of a key of the running model; keys that are on disk already so stay as they are."""
    if rename(key, CANONICAL, backwards=True) is not None:
        return key
    if key.startswith(
        "vision_tower."
    ):  # written by transformers >= 5.6 from a model that was built from a config
        return "vision_tower.vision_model." + key.removeprefix("vision_tower.")
    return rename(key, CANONICAL) or key


def canonical_state(state: State) -> State:
    """A table under canonical names, without the buffers that follow from the configuration."""
    return {canonical_key(key): entry for key, entry in state.items() if not key.endswith(DERIVED_BUFFERS)}


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical key -> shape of every tensor a model of this configuration has, in the order of the model."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {canonical_key(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def model_state(model: Any, tensors: dict[str, Tensor] | None = None) -> State:
    """Canonical table of a running model. tensors: its gathered state dict where the parameters are sharded."""
    named: Iterable[tuple[str, Tensor]] = (tensors or model.state_dict()).items()
    return canonical_state({key: of_tensor(tensor) for key, tensor in named})


def untie(config: LlavaConfig) -> None:
    """Embeddings and lm_head are stored apart in every file written here, whatever the LLM did."""
    config.tie_word_embeddings = False
    config.text_config.tie_word_embeddings = False


def instantiate(
    config: LlavaConfig,
    state: State,
    where: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    quantization: str | None = None,
    attn_implementation: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """The running model from a canonical table: 0 missing and 0 unexpected tensors, or a ValueError.

    quantization: None, "4bit" (NF4, double quantisation) or "8bit" for the language model; `lm_head`, the vision
    tower and the projector keep `dtype`. device: "cpu", "cuda", "cuda:0", … or "auto" (spread over the GPUs).
    Goes through `from_pretrained` so that ZeRO-3, device maps and bitsandbytes work as anywhere else.
    """
    assert_same_keys(state, expected_shapes(config), where)
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    if device == "auto":
        options["device_map"] = "auto" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" or quantization is not None:
        options["device_map"] = {"": device}
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict={key: entry.read() for key, entry in state.items()},
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    left = {kind: keys for kind, keys in report.items() if keys}
    if left:
        raise ValueError(f"{where}: transformers did not take every tensor: {left}")
    return model.eval()


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes settings for "4bit" or "8bit"; see `NOT_QUANTISED` for what stays in `dtype`."""
    if kind not in ("4bit", "8bit"):
        raise ValueError(f"quantization is {kind!r}; it can be None, '4bit' or '8bit'")
    return BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )
