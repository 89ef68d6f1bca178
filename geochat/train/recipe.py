"""Which parameters train at which learning rate, and the resolved recipe as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from geochat.model.adapter import trainable_groups
from geochat.model.processor import Processor
from geochat.model.vision import blocks_read
from geochat.train.arguments import Arguments, ModelArguments, TrainingArguments
from geochat.train.mixture import Mixture
from geochat.train.presets import PRESETS


def choose_trainable(model: nn.Module, arguments: ModelArguments) -> None:
    """Freeze and unfreeze the parts of a LlavaForConditionalGeneration for training without LoRA.

    LLaVA's meaning of the flags: language model and projector train; `--tune_mm_mlp_adapter` leaves only the
    projector, `--freeze_backbone` and `--freeze_mm_mlp_adapter` take one away, `--tune_vision_tower` adds the tower.
    """
    model.requires_grad_(False)
    parts = model.model
    if not (arguments.tune_mm_mlp_adapter or arguments.freeze_backbone):
        parts.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if not arguments.freeze_mm_mlp_adapter:
        parts.multi_modal_projector.requires_grad_(True)
    if arguments.tune_vision_tower:
        unfreeze_tower(model, arguments.tune_vit_from_layer)


def unfreeze_tower(model: nn.Module, from_layer: int | None) -> None:
    """Train the tower from block `from_layer` on (None: everything), as far as its output is used.

    Blocks behind the last layer that is read, and the final norm, never get a gradient; leaving them trainable
    would make data-parallel training wait for one.
    """
    tower = model.model.vision_tower
    blocks = tower.encoder.layers if hasattr(tower, "encoder") else tower.vision_model.encoder.layers
    read = blocks_read(model.config)
    if from_layer is None:
        tower.requires_grad_(True)
    elif not 0 <= from_layer < read:
        raise ValueError(
            f"--tune_vit_from_layer {from_layer}: choose one of the blocks 0 to {read - 1} that are read"
        )
    for index, block in enumerate(blocks):
        block.requires_grad_((from_layer or 0) <= index < read)
    for name, parameter in tower.named_parameters():
        if "post_layernorm" in name:
            parameter.requires_grad_(False)


def choose_states(config: Any, layers: int | list[int] | None, folder: Path) -> None:
    """Let the projector see the tower's states that `--mm_vision_select_layer` names, if they are as many as before.

    Raises: ValueError when they are more or fewer: the projector's first layer would have another width.
    """
    own = config.vision_feature_layer
    if layers is None or layers == own:
        return
    if len(layers if isinstance(layers, list) else [layers]) != len(own if isinstance(own, list) else [own]):
        raise ValueError(
            f"--mm_vision_select_layer {layers}: the projector of {folder} was made for {own}; leave the flag out, "
            "or build the model from a language model and a CLIP folder"
        )
    config.vision_feature_layer = layers


def learning_rates(args: TrainingArguments) -> dict[str, float]:
    """Learning rate of each group of `trainable_groups`."""
    rates = {"projector": args.mm_projector_lr}
    rates |= dict.fromkeys(("vision_tower", "vision_lora"), args.vision_tower_lr)
    default = args.learning_rate
    return {
        name: default if rates.get(name) is None else rates[name]  # type: ignore[misc]
        for name in ("lora", "language_model", "projector", "vision_lora", "vision_tower")
    }


def parameter_groups(model: nn.Module, args: TrainingArguments, decayed: set[str]) -> list[dict[str, Any]]:
    """Optimizer groups: one per part and weight decay, the main part first (its rate is the one logged).

    Raises: ValueError when nothing trains.
    """
    groups = []
    rates = learning_rates(args)
    parts = trainable_groups(model)
    for part, rate in rates.items():
        for decay in (True, False):
            members = [p for name, p in parts.get(part, []) if (name in decayed) == decay]
            if members:
                weight_decay = args.weight_decay if decay else 0.0
                groups.append({"params": members, "lr": rate, "weight_decay": weight_decay})
    if not groups:
        raise ValueError("nothing to train: the flags freeze every part of the model")
    return groups


def describe(
    model: nn.Module,
    processor: Processor,
    arguments: Arguments,
    training: Mixture,
    validation: Mixture | None,
) -> str:
    """The resolved recipe, one fact per line."""
    model_args, data_args, args = arguments
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = [("model", str(model_args.model_name_or_path))]
    if args.preset:
        rows.insert(0, ("preset", f"{args.preset}: {PRESETS[args.preset].source}"))
    rates = learning_rates(args)
    for part, members in trainable_groups(model).items():
        if members:
            count = sum(parameter.numel() for _, parameter in members)
            rows.append(
                (f"trains {part}", f"{count:,} of {total:,} parameters, learning rate {rates[part]:g}")
            )
    if args.lora_enable:
        kind = "DoRA" if args.use_dora else "LoRA"
        rows.append((kind, f"rank {args.lora_r}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"))
        if args.vision_lora_r:
            rows.append(
                (f"{kind} on the tower", f"rank {args.vision_lora_r}, alpha {args.vision_lora_alpha}")
            )
        if args.bits < 16:
            rows.append(("quantised", f"language model, {args.bits} bits{', NF4' if args.bits == 4 else ''}"))
    per_device, steps, processes = (
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    batch = per_device * steps * processes
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    stage = zero_stage(args)
    rows += [
        ("data", f"{' '.join(data_args.data_path or [])}, {len(training):,} samples, {length}"),
        *((f"· {name}", share) for name, share in training.describe()),
        *([("validation", f"{len(validation):,} samples")] if validation else []),
        ("global batch", f"{batch} = {per_device} per device × {steps} accumulation × {processes} processes"),
        ("schedule", f"{_value(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}, decay {args.weight_decay:g}"),
        ("image", f"{processor.image_size} px, {processor.image_mode}, {processor.image_tokens} tokens per image"),
        ("tower's states read", str(model.config.vision_feature_layer)),
        ("text", f"at most {args.model_max_length} tokens, template {processor.template.name}"),
        ("loss", f"supervised positions only, mean per {args.loss_normalization.replace('_', '-')}"),
        ("rows", rows_are(args)),
        ("precision", precision(args)),
        ("attention", str(model.config._attn_implementation)),
        ("checkpointing", checkpointing(args)),
        ("ZeRO", f"stage {stage}" if stage else "off"),
        *([("FSDP", f"version {args.fsdp_plugin_args['fsdp_version']}")] if args.fsdp else []),
        ("seed", str(args.seed)),
    ]  # fmt: skip
    return "\n".join(f"{name:>22}  {value}" for name, value in rows)


def rows_are(args: TrainingArguments) -> str:
    """How samples lie in a batch."""
    shared = "samples of an image share its tokens" if args.share_image_prefix else "one sample each"
    most = args.max_tokens_per_micro_batch
    return f"{shared}, {'packed' if args.packing else 'padded'}{f', at most {most:,} tokens at once' if most else ''}"


def checkpointing(args: TrainingArguments) -> str:
    """Whether activations are computed twice, and why where the flag left it open."""
    does = f"activations {'recomputed' if args.gradient_checkpointing else 'kept'}"
    return f"{does}: {args.checkpointing_reason}" if args.checkpointing_reason else does


def precision(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    return getattr(torch, precision(args))


def zero_stage(args: TrainingArguments) -> int:
    """0 without DeepSpeed."""
    return args.zero_configuration.get("stage", 0)


def offloads(args: TrainingArguments, part: Literal["optimizer", "param"]) -> bool:
    """Whether ZeRO keeps the optimizer's state, or the weights, in main memory or on a disk."""
    return args.zero_configuration.get(f"offload_{part}", {}).get("device", "none") != "none"


def _value(setting: Any) -> str:
    return str(getattr(setting, "value", setting))
