"""The model of a run without its weights: what a plan needs, from configuration and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from geochat.model.build import read_config, read_parts
from geochat.model.canonical import canonical_state, expected_shapes, untie
from geochat.model.open import recognise
from geochat.model.processor import Processor
from geochat.model.vision import resize_config
from geochat.model.weights import Entry, State, assert_same_keys, open_file, read_header
from geochat.train.arguments import IMAGE_MODES, DataArguments, ModelArguments, TrainingArguments
from geochat.train.recipe import choose_states, compute_dtype

_EMBEDDINGS = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Outline:
    """A model whose parameters have shapes and types, but no values."""

    model: nn.Module
    config: LlavaConfig
    processor: Processor
    notes: tuple[str, ...]
    """What could not be looked at."""


def outline(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Outline:
    """The model that training would build from the same flags.

    Needs config.json and the tokenizer of each folder; weight files are looked into as far as their header goes
    where they are there. Raises: ValueError that names the folder and what is wrong with it.
    """
    folder = Path(model_args.model_name_or_path or "")
    if not folder.is_dir():
        raise ValueError(f"--model_name_or_path {folder}: no such folder")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter: merge it first (scripts/merge_lora_weights.py)")
    here = announced(folder)
    notes = [] if here else [f"{folder} holds no weights: planned from its config.json alone"]
    if recognise(folder) == "canonical":
        config, processor = _canonical(folder, here, model_args)
    else:
        tower, layer = model_args.vision_tower, model_args.feature_layer
        config, _, processor = read_parts(
            folder,
            Path(tower) if tower else None,
            image_size=model_args.image_size or 504,
            template=model_args.version,
            feature_layer=layer,
            seed=None,
            read=expected,
        )
        frozen = model_args.projector_is_frozen(args.lora_enable)
        if frozen and not model_args.pretrain_mm_mlp_adapter and not any("mm_projector" in k for k in here):
            why = "holds no projector" if here else "holds no weights, so perhaps no projector"
            notes.append(
                f"{folder} {why}; the projector is frozen, so training will want --pretrain_mm_mlp_adapter"
            )
    processor.image_mode = IMAGE_MODES[data_args.image_aspect_ratio]
    return Outline(_without_values(config, model_args, args), config, processor, tuple(notes))


def _canonical(folder: Path, here: State, model_args: ModelArguments) -> tuple[LlavaConfig, Processor]:
    config = LlavaConfig.from_dict(read_config(folder))
    untie(config)
    processor = Processor.load(folder)
    if here:
        state = canonical_state(here)
        if _EMBEDDINGS in state:
            state.setdefault(_HEAD, state[_EMBEDDINGS])  # tied, in a folder of another program
        assert_same_keys(state, expected_shapes(config), str(folder))
    choose_states(config, model_args.feature_layer, folder)
    if model_args.image_size:
        resize_config(config, model_args.image_size)
        processor = processor.with_image_size(model_args.image_size)
    if model_args.version:
        processor = processor.with_template(model_args.version)
    return config, processor


def _without_values(
    config: LlavaConfig, model_args: ModelArguments, args: TrainingArguments
) -> LlavaForConditionalGeneration:
    """The types are those of training: float32 where weights train without DeepSpeed, else the compute type."""
    dtype = compute_dtype(args) if args.lora_enable or args.deepspeed else torch.float32
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(dtype)
    # Named only: the kernels need not be installed here.
    model.config._attn_implementation_internal = model_args.attn_implementation
    return model


def announced(folder: Path) -> State:
    """The tensors that the weight files of a folder announce; none of them is read. A safetensors file may end
    behind its header."""
    found: State = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        if file.suffix == ".safetensors":
            header = read_header(file, whole=False)
            found |= {key: _unread(tuple(record["shape"])) for key, record in header.items()}
        else:
            found |= open_file(file)
    return found


def expected(folder: Path) -> State:
    """What a folder announces, or where its weights have not come yet, those that its config.json speaks of and that
    decide on the shapes of the model."""
    if here := announced(folder):
        return here
    config = read_config(folder)
    vision = config.get("vision_config", config)
    if config["model_type"] in ("clip", "clip_vision_model"):
        rows = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        return {"vision_model.embeddings.position_embedding.weight": _unread((rows, vision["hidden_size"]))}
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    if config["model_type"] == "internlm2":
        names = ["model.tok_embeddings.weight", "output.weight"]
    return {name: _unread((config["vocab_size"], config["hidden_size"])) for name in names}


def _unread(shape: tuple[int, ...]) -> Entry:
    def read() -> torch.Tensor:
        raise AssertionError("a plan reads no weights")

    return Entry(shape, torch.float32, read)
