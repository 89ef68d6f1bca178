"""The published recipes by name: values that stand in for the defaults of the flags. A flag that is given wins.

Where the sources of a recipe disagree is told in docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Flags = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """One published recipe."""

    source: str
    """Who published it, in a few words."""
    zero: int
    """The ZeRO stage it ran with; the script of the recipe asks for it."""
    flags: Flags
    """What differs from the defaults of this program, by the flags' names."""


_SCHEDULE: Flags = {
    "num_train_epochs": 1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
}
_PADDED_336: Flags = {"image_size": 336, "image_aspect_ratio": "pad"}

_GEOCHAT: Flags = {
    **_SCHEDULE,
    "version": "v1",
    "image_size": 504,
    "image_aspect_ratio": "pad",
    "lora_enable": True,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "learning_rate": 2e-4,
    "global_batch_size": 144,
}
_VHM: Flags = {**_SCHEDULE, **_PADDED_336, "lora_enable": False, "learning_rate": 2e-5}

PRESETS: dict[str, Preset] = {
    "geochat_lora": Preset("GeoChat's README; rate and rank of its code", 3, _GEOCHAT),
    "geochat_lora_script": Preset("what GeoChat's script ran", 2, {**_GEOCHAT, "global_batch_size": 96}),
    "geochat_full": Preset(
        "GeoChat's README, table of hyperparameters",
        3,
        {
            **{name: value for name, value in _GEOCHAT.items() if not name.startswith("lora")},
            "lora_enable": False,
            "learning_rate": 2e-5,
        },
    ),
    "llava_pretrain": Preset(
        "LLaVA-1.5's first stage",
        2,
        {
            **_SCHEDULE,
            "version": "plain",
            "image_size": 336,
            "image_aspect_ratio": "square",
            "lora_enable": False,
            "tune_mm_mlp_adapter": True,
            "learning_rate": 1e-3,
            "global_batch_size": 256,
        },
    ),
    "dora": Preset(
        "DoRA's LLaVA-1.5 experiment",
        3,
        {
            **_SCHEDULE,
            **_PADDED_336,
            "version": "v1",
            "lora_enable": True,
            "use_dora": True,
            "lora_r": 128,
            "lora_alpha": 256,
            "lora_dropout": 0.05,
            "tune_mm_mlp_adapter": True,
            "learning_rate": 2e-4,
            "mm_projector_lr": 2e-5,
            "group_by_modality_length": True,
            "global_batch_size": 128,
        },
    ),
    "geochat_bench_qlora": Preset(
        "GeoChat-Bench's configuration for XTuner",
        2,
        {
            **_SCHEDULE,
            **_PADDED_336,
            "version": "internlm2_chat",
            "lora_enable": True,
            "bits": 4,
            "lora_r": 512,
            "lora_alpha": 256,
            "lora_dropout": 0.05,
            "vision_lora_r": 64,
            "vision_lora_alpha": 16,
            "tune_mm_mlp_adapter": True,
            "learning_rate": 2e-4,
            "max_grad_norm": 1.0,
            "model_max_length": 1472,
            "global_batch_size": 128,
        },
    ),
    "vhm_pretrain": Preset(
        "VHM's first stage, as its README tells it",
        3,
        {
            **_VHM,
            "image_aspect_ratio": "square",
            "version": "plain",
            "mm_vision_select_layer": [8, 16, 24],
            "tune_vision_tower": True,
            "tune_vit_from_layer": 12,
            "global_batch_size": 256,
        },
    ),
    "vhm_finetune": Preset(
        "VHM's second stage",
        3,
        {
            **_VHM,
            "version": "v1",
            "mm_vision_select_layer": [8, 16, 24],
            "group_by_modality_length": True,
            "global_batch_size": 128,
        },
    ),
}


def with_preset(argv: list[str], notes: list[str]) -> list[str]:
    """The command line with the values of its `--preset` in front, so that the flags behind them win.

    An accumulation that is given on its own stands instead of the preset's global batch; `notes` then says so.
    Raises: ValueError for a name that is none.
    """
    if "--preset" not in argv:
        return argv
    place = argv.index("--preset")
    name = argv[place + 1] if place + 1 < len(argv) else ""
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    flags = dict(PRESETS[name].flags)
    if "--gradient_accumulation_steps" in argv and "--global_batch_size" not in argv:
        batch = flags.pop("global_batch_size")
        notes.append(f"--gradient_accumulation_steps stands instead of the preset's global batch of {batch}")
    words: list[str] = []
    for flag, value in flags.items():
        if f"--{flag}" not in argv:
            words += [f"--{flag}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return words + argv
