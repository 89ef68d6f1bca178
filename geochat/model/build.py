"""One model and one processor from an LLM folder, a CLIP folder and, where there is one, a projector file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from geochat.data.sample import IMAGE_TOKEN
from geochat.data.templates import get_template
from geochat.model.canonical import instantiate
from geochat.model.formats.gguf_file import is_gguf
from geochat.model.formats.internlm2 import Heads, from_internlm2
from geochat.model.formats.llava import from_clip, from_llava
from geochat.model.language import LanguageModel, read_gguf, see_with
from geochat.model.processor import PAD_TOKEN, Processor
from geochat.model.projector import fresh_projector, read_projector
from geochat.model.staging import unfinished
from geochat.model.tokenizer import load_tokenizer
from geochat.model.vision import grid_side, resample_positions
from geochat.model.weights import (
    Entry,
    State,
    open_weights,
    read_json,
)

VOCABULARY_MULTIPLE = 64
"""Rows of the vocabulary are padded to this; tensor cores and tensor parallelism want it."""

_LLAMA_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "initializer_range",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "pretraining_tp",
]
_LLAMA_TYPES = ("llama", "llava", "llava_llama", "geochat", "vhm", "internlm", "internlm2")
GEOCHAT_SIZE = 504
"""GeoChat's resolution: no config.json says it, its code does."""
_MEAN_COLUMNS = 256
_TOWER = "vision_tower."
_EMBEDDINGS = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"
_POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


def build_model(
    llm: Path | str,
    vision_tower: Path | str | None = None,
    projector: Path | str | None = None,
    *,
    image_size: int | None = 504,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    feature_layer: int | list[int] | None = None,
    device: str = "cpu",
    quantization: str | None = None,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, Processor]:
    """A running model and its processor; see `read_parts` for the folders and errors.

    device, quantization, attn_implementation: as in `geochat.model.checkpoint.load`.
    """
    config, state, processor = read_parts(
        llm,
        vision_tower,
        projector,
        image_size=image_size,
        template=template,
        feature_layer=feature_layer,
        seed=seed,
    )
    dtype = dtype or stored_dtype(config)
    model = instantiate(
        config,
        state,
        str(llm),
        dtype=dtype,
        device=device,
        quantization=quantization,
        attn_implementation=attn_implementation,
    )
    model.generation_config = generation_config(config, processor)
    return model, processor


def read_parts(
    llm: Path | str,
    vision_tower: Path | str | None = None,
    projector: Path | str | None = None,
    *,
    image_size: int | None = 504,
    template: str | None = None,
    feature_layer: int | list[int] | None = None,
    seed: int | None = 0,
    read: Callable[[Path], State] = open_weights,
) -> tuple[LlavaConfig, State, Processor]:
    """Configuration, unread canonical weights and processor of the model that three folders make.

    llm: a Llama, InternLM or InternLM2 folder, or one in LLaVA's original layout (LLaVA-1.5, GeoChat, VHM), whose
        projector is then used unless another is given; or a GGUF file of a Llama, with `mmproj` beside it or not.
    vision_tower: a CLIPVisionModel or CLIPModel folder; its position table is resampled to `image_size`. It goes
        before a tower inside the LLM folder, as in the original code. None: the tower inside, or the folder that
        `mm_vision_tower` of config.json names, there or beside the LLM folder. A GGUF `mmproj` brings its projector.
    image_size: None: 504 for GeoChat, else the tower's own.
    projector: `mm_projector.bin`, a safetensors file, or a folder with either; None: LLaVA's own, or a fresh one.
    template: name of a chat template; None: the one that the special tokens of the language model are made for.
    feature_layer: hidden state(s) of the tower that the projector sees; None: what the LLM folder says, else -2.
    seed: of a fresh projector, where the folders hold none; None: make none, the table returned then has none.
    read: the tensors of a folder; for a plan, those that it will hold once its weights have come.

    `<image>` and `<pad>` are added to the vocabulary, which is padded to a multiple of 64. New rows of the
    embeddings and of lm_head are the mean of the old ones: the same on every machine, and no new word stands out.
    Raises ValueError for a folder that is not what it should be, naming the file.
    """
    llm = Path(llm)
    brings_projector = is_gguf(vision_tower)
    part = read_gguf(llm, beside=not brings_projector) if is_gguf(llm) else _read_folder(llm, read)
    source, state, tokenizer, sentencepiece, inside = part
    if vision_tower is not None and brings_projector:
        inside, vision_tower = see_with(Path(vision_tower), source, state), None
    if _HEAD not in state and source.get("tie_word_embeddings"):
        state[_HEAD] = state[_EMBEDDINGS]
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.backend_tokenizer.add_special_tokens([IMAGE_TOKEN])
    image_id = tokenizer.backend_tokenizer.token_to_id(IMAGE_TOKEN)
    rows = -(-max(len(tokenizer), source["vocab_size"]) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    tower, vision_config = _tower(llm, source, state, vision_tower, inside, read)
    if image_size is None:
        image_size = GEOCHAT_SIZE if source["model_type"] == "geochat" else vision_config.image_size
    side = grid_side(image_size, vision_config.patch_size)
    layer = feature_layer if feature_layer is not None else source.get("mm_vision_select_layer", -2)
    text = {name: source[name] for name in _LLAMA_FIELDS if source.get(name) is not None}
    text |= {"vocab_size": rows, "attention_bias": bool(source.get("attention_bias") or source.get("bias"))}
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=LlamaConfig(**text, tie_word_embeddings=False),
        image_token_index=image_id,
        image_seq_length=side * side,
        vision_feature_layer=layer,
        tie_word_embeddings=False,
        dtype=source.get("dtype") or source.get("torch_dtype") or "float32",
    )
    config.vision_config.image_size = image_size
    for part in (config, config.text_config):
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        part.pad_token_id = tokenizer.pad_token_id

    state = {key: entry for key, entry in state.items() if not key.startswith(_TOWER)} | tower
    for key in (_EMBEDDINGS, _HEAD):
        if key not in state:
            raise ValueError(f"{llm}: has no {key}")
        state[key] = _with_rows(state[key], rows, known)
    table = state[_POSITIONS].to(torch.float32)  # resampled before it is rounded
    state[_POSITIONS] = table.map(
        lambda rows_: resample_positions(rows_, side), (1 + side * side, vision_config.hidden_size)
    )
    if projector is not None:
        state |= read_projector(Path(projector))
    elif "multi_modal_projector.linear_1.weight" not in state and seed is not None:
        state |= fresh_projector(config, seed)
    processor = Processor(
        tokenizer=tokenizer,
        template=get_template(template or _usual_template(tokenizer, source["model_type"])),
        image_size=image_size,
        patch_size=vision_config.patch_size,
        image_token_id=image_id,
        pad_token_id=tokenizer.pad_token_id,
        sentencepiece=sentencepiece,
    )
    return config, state, processor


def _read_folder(llm: Path, read: Callable[[Path], State]) -> LanguageModel:
    source = read_config(llm)
    if source.get("model_type") not in _LLAMA_TYPES:
        raise ValueError(
            f"{llm}: is a {source.get('model_type')} model; a Llama-architecture folder is needed"
        )
    weights = read(llm)
    if source["model_type"] == "internlm2":
        weights = from_internlm2(weights, Heads.of(source), str(llm))
    spm = llm / "tokenizer.model"
    own = spm.read_bytes() if spm.exists() else None
    return LanguageModel(source, from_llava(weights, str(llm)), load_tokenizer(llm), own, None)


def _usual_template(tokenizer: PreTrainedTokenizerFast, model_type: str) -> str:
    """The template whose role marks the tokenizer knows as single tokens; Vicuna's writes its roles as words."""
    if tokenizer.backend_tokenizer.token_to_id("<|start_header_id|>") is not None:
        return "llama_3"
    if tokenizer.backend_tokenizer.token_to_id("<|im_start|>") is not None:
        return "internlm2_chat" if model_type == "internlm2" else "chatml"
    return "vicuna_v1"


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype a configuration records; float32 when it records none."""
    value = config.dtype
    if isinstance(value, str):
        value = getattr(torch, value)
    return value if isinstance(value, torch.dtype) else torch.float32


def generation_config(config: LlavaConfig, processor: Processor) -> GenerationConfig:
    """Greedy by default; rows that stand for no text (`<image>`, `<pad>`, filling) can never be generated."""
    tokenizer = processor.tokenizer
    stops = [tokenizer.eos_token_id]
    for text in processor.template.stop:
        stop = tokenizer.backend_tokenizer.token_to_id(text)
        if stop is not None and stop not in stops:
            stops.append(stop)
    mute = {
        processor.image_token_id,
        processor.pad_token_id,
        *range(len(tokenizer), config.text_config.vocab_size),
    }
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=processor.pad_token_id,
        suppress_tokens=sorted(mute),
    )


def _with_rows(entry: Entry, rows: int, known: int) -> Entry:
    """A [V, C] table with `rows` rows: the first `known` as they are, the others their mean."""

    def grow(table: Tensor) -> Tensor:
        old = table[:known]
        # By columns: the whole table in float64 would be a gigabyte for a 7B model.
        parts = [columns.mean(0, dtype=torch.float64) for columns in old.split(_MEAN_COLUMNS, dim=1)]
        mean = torch.cat(parts).to(table.dtype)
        return torch.cat([old, mean.expand(rows - old.shape[0], -1)])

    return entry.map(grow, (rows, entry.shape[1]))


def _tower(
    llm: Path,
    source: dict[str, Any],
    state: State,
    given: Path | str | None,
    own: CLIPVisionConfig | None,
    read: Callable[[Path], State],
) -> tuple[State, CLIPVisionConfig]:
    """The tower's tensors under canonical names, and its configuration: from the folder given, from inside the LLM
    folder (own: the configuration that came along), or from the folder that config.json names."""
    inside = {key: entry for key, entry in state.items() if key.startswith(_TOWER)}
    folder = Path(given) if given is not None else local_folder(llm, source.get("mm_vision_tower"))
    if given is not None or (folder is not None and not inside):
        assert folder is not None
        config = _vision_config(folder)
        tower = from_clip(read(folder), str(folder))
        if _POSITIONS not in tower:
            raise ValueError(f"{folder}: has no position table; is it a CLIP vision folder?")
        return tower, config
    if not inside:
        named = source.get("mm_vision_tower")
        said = (
            f"names the vision tower {named}, which is not on this disk" if named else "has no vision tower"
        )
        raise ValueError(f"{llm}: {said}; give its CLIP folder with --vision-tower")
    return inside, own or (_vision_config(folder) if folder else clip_config(inside, str(llm)))


def local_folder(beside: Path, named: str | None) -> Path | None:
    """The folder that a configuration names, where it is on this disk: as it stands, in the folder `beside`, or next
    to it; None when it is not there."""
    if not named:
        return None
    places = (Path(named), beside / named, beside.parent / named, beside.parent / Path(named).name)
    return next((place for place in places if (place / "config.json").is_file()), None)


def clip_config(tower: State, where: str) -> CLIPVisionConfig:
    """The configuration of a tower that came without one, from its shapes. Heads are 64 wide, as in every CLIP."""
    stem = f"{_TOWER}vision_model."
    try:
        patches = tower[f"{stem}embeddings.patch_embedding.weight"].shape  # [hidden, 3, patch, patch]
        rows = tower[_POSITIONS].shape[0]
        wide = tower[f"{stem}encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{where}: the vision tower inside has no {error.args[0]}") from None
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key in tower if ".layers." in key}
    return CLIPVisionConfig(
        hidden_size=patches[0], intermediate_size=wide, num_hidden_layers=len(layers),
        num_attention_heads=max(1, patches[0] // 64), patch_size=patches[-1],
        image_size=math.isqrt(rows - 1) * patches[-1], hidden_act="quick_gelu",
    )  # fmt: skip


def _vision_config(folder: Path) -> CLIPVisionConfig:
    source = read_config(folder)
    if source.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder}: is a {source.get('model_type')} model; a CLIP folder is needed")
    return CLIPVisionConfig(**source.get("vision_config", source))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises ValueError when there is none, or when it is damaged."""
    file = folder / "config.json"
    if not file.exists():
        why = "its save was stopped: run the command again" if unfinished(folder) else "no config.json"
        raise ValueError(f"{folder}: no checkpoint there ({why})")
    return read_json(file)
