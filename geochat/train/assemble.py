"""What a run is put together from: the model to start from, what of it trains, how samples become a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from geochat.model.adapter import AdapterSpec, attach, trainable_groups
from geochat.model.base import BaseRecord
from geochat.model.build import build_model
from geochat.model.checkpoint import load
from geochat.model.formats.gguf_file import is_gguf
from geochat.model.open import recognise
from geochat.model.processor import Processor
from geochat.model.weights import open_weights, read_json
from geochat.train.arguments import IMAGE_MODES, Arguments, ModelArguments, TrainingArguments
from geochat.train.collate import Collator
from geochat.train.packing import PackingCollator
from geochat.train.recipe import choose_states, choose_trainable, compute_dtype, unfreeze_tower, zero_stage
from geochat.train.saving import Kind, load_projector


def load_base(arguments: Arguments) -> tuple[nn.Module, Processor, BaseRecord]:
    """The model to start from, its processor, and what an adapter will remember of it."""
    model_args, data_args, args = arguments
    folder = Path(model_args.model_name_or_path or "")
    if not folder.is_dir() and not is_gguf(folder):
        raise ValueError(f"--model_name_or_path {folder}: no such folder")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter: merge it first (scripts/merge_lora_weights.py)")
    # Without DeepSpeed the weights that train stay in float32 and the forward pass is autocast; DeepSpeed keeps
    # float32 copies itself and wants one dtype.
    dtype = compute_dtype(args) if args.lora_enable or args.deepspeed else torch.float32
    quantised: dict[str, Any] = {}
    if args.quantization:
        if zero_stage(args) == 3:
            raise ValueError(
                f"--bits {args.bits} with ZeRO-3: quantised weights cannot be spread; use scripts/zero2.json"
            )
        quantised = {"quantization": args.quantization, "device": str(args.device)}
    tower = Path(model_args.vision_tower) if model_args.vision_tower else None
    projector = Path(model_args.pretrain_mm_mlp_adapter) if model_args.pretrain_mm_mlp_adapter else None
    if is_canonical(folder):
        model, processor = load(
            folder,
            image_size=model_args.image_size,
            dtype=dtype,
            **quantised,
            attn_implementation=model_args.attn_implementation,
        )
        choose_states(model.config, model_args.feature_layer, folder)
        if model_args.version:
            processor = processor.with_template(model_args.version)
        if projector:
            load_projector(model, projector)
        if tower:
            args.notes.append(f"--vision_tower is not used: {folder} holds its tower")
            tower = None
    else:
        frozen = model_args.projector_is_frozen(args.lora_enable)
        if frozen and projector is None and not brings_projector(folder, tower):
            raise ValueError(
                f"{folder} holds no projector, and a fresh one would stay frozen: give one with "
                "--pretrain_mm_mlp_adapter, or train it with --tune_mm_mlp_adapter True"
            )
        model, processor = build_model(
            folder,
            tower,
            projector,
            image_size=model_args.image_size or 504,
            template=model_args.version,
            dtype=dtype,
            feature_layer=model_args.feature_layer,
            **quantised,
            attn_implementation=model_args.attn_implementation,
        )
    processor.image_mode = IMAGE_MODES[data_args.image_aspect_ratio]
    return model, processor, BaseRecord.of(folder, tower, projector)


def brings_projector(folder: Path, tower: Path | None) -> bool:
    """Whether the language model (LLaVA's layout, GGUF) or the tower (GGUF's `mmproj`) comes with a projector."""
    if is_gguf(tower) or is_gguf(folder):
        return is_gguf(tower) or recognise(folder) == "gguf"
    return any("mm_projector" in key for key in open_weights(folder))


def is_canonical(folder: Path) -> bool:
    """True for a folder of `LlavaForConditionalGeneration`; LLaVA's own layout shares its `model_type`."""
    if is_gguf(folder):
        return False
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(f"{folder}: no config.json, so this is no model folder")
    return "LlavaForConditionalGeneration" in read_json(config).get("architectures", [])


def make_trainable(
    base: nn.Module, model_args: ModelArguments, args: TrainingArguments
) -> tuple[Kind, nn.Module]:
    """Attach adapters or unfreeze parts. Raises: ValueError when the flags freeze everything."""
    if args.lora_enable:
        spec = AdapterSpec(
            r=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            use_dora=args.use_dora,
            train_projector=model_args.tune_mm_mlp_adapter,
            vision_r=args.vision_lora_r,
            vision_alpha=args.vision_lora_alpha,
        )
        model = attach(base, spec)
        if model_args.tune_vision_tower:
            unfreeze_tower(base, model_args.tune_vit_from_layer)
        if not args.deepspeed:
            for members in trainable_groups(model).values():
                for _, parameter in members:
                    parameter.data = parameter.data.float()
        return "adapter", model
    choose_trainable(base, model_args)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise ValueError("nothing is left to train: every part is frozen by a flag")
    only_projector = model_args.tune_mm_mlp_adapter and not model_args.tune_vision_tower
    return ("projector" if only_projector else "full"), base


def make_collator(processor: Processor, args: TrainingArguments, attention: str) -> Collator:
    """How samples become a batch. Raises: ValueError when the attention cannot do what the flags ask for."""
    if not (args.share_image_prefix or args.packing or args.max_tokens_per_micro_batch):
        return Collator(processor.pad_token_id)
    if args.share_image_prefix and attention not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"--attn_implementation {attention} cannot keep the questions about one image apart: with "
            "--share_image_prefix use sdpa or flex_attention"
        )
    return PackingCollator(
        processor.pad_token_id,
        processor.image_token_id,
        share=args.share_image_prefix,
        pack=args.packing,
        one_row=attention not in ("sdpa", "eager"),
        budget=args.max_tokens_per_micro_batch,
    )
