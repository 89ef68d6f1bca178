"""LLaVA's outdated flags: renamed ones are translated, meaningless ones are dropped with one line each."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geochat.train.arguments import ModelArguments, TrainingArguments

LEGACY_RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps",  # a value below 1 is a share of all steps
    "--group_by_length": "--group_by_modality_length",
    "--unfreeze_mm_vision_tower": "--tune_vision_tower",
    "--local-rank": "--local_rank",
    "--no_cuda": "--use_cpu",
}

VHM_RENAMED = {"--data_path": "--image_folder", "--list_file": "--data_path"}
"""What VHM's words mean on a command line that has both: the folder, and the records of its images."""

LEGACY_DROPPED = {
    "--lazy_preprocess": "samples are always encoded when they are read",
    "--is_multimodal": "every record says itself whether it has images",
    "--image_grid_pinpoints": "one image size per model, see --image_size",
    "--mm_use_im_patch_token": "the image placeholder is always one <image> token, expanded",
    "--mm_vision_select_feature": "patch features, as in every released checkpoint",
    "--mm_patch_merge_type": "one tile per image",
    "--cache_dir": "models are read from local folders",
    "--mpt_attn_impl": "MPT models are not supported",
    "--save_safetensors": "weights are always written as safetensors",
    "--logging_dir": "logs go to the run folder",
    "--lora_bias": "biases are not trained, LLaVA's own default",
    "--lora_weight_path": "LLaVA reads it nowhere",
    "--run_name": "the run is named by its folder",
}


_OF_THE_ORIGINALS = ("--lazy_preprocess", "--mm_use_im_patch_token", "--is_multimodal", "--tune_entire_model")
"""Flags that only command lines written for LLaVA, GeoChat or VHM have."""


def with_their_defaults(argv: list[str], kept: list[str], notes: list[str]) -> list[str]:
    """The translated command line, with the defaults of the originals where `argv` was written for them.

    LLaVA trains the model itself unless LoRA is asked for, and the projector beside LoRA; it crops images unless told
    to pad them. GeoChat's own line does not train the projector, and differs from LLaVA's in that it names no rate for
    it. A logger that is not installed ends no such run: the loss is written anyway.
    """
    if "--preset" in kept or not any(word.split("=")[0] in _OF_THE_ORIGINALS for word in argv):
        return kept
    added: list[str] = []
    if "--lora_enable" not in kept:
        added += ["--lora_enable", "False"]
    elif "--mm_projector_lr" in kept and "--tune_mm_mlp_adapter" not in kept and _asks_for_lora(kept):
        added += ["--tune_mm_mlp_adapter", "True"]
    if "--image_aspect_ratio" not in kept:
        added += ["--image_aspect_ratio", "square"]
    if added:
        notes.append(
            f"{' '.join(added)} is taken from this command line's being LLaVA's; give it to say otherwise"
        )
    if "--image_size" not in kept:
        notes.append(
            "without --image_size images are seen as GeoChat does, at 504 px; --image_size 336 is LLaVA's and VHM's"
        )
    return added + _without_absent_logger(kept, notes)


def _without_absent_logger(words: list[str], notes: list[str]) -> list[str]:
    place = words.index("--report_to") + 1 if "--report_to" in words else len(words)
    name = "".join(words[place : place + 1])
    if name in ("", "none", "all") or find_spec(name):
        return words
    notes.append(f"--report_to {name} is ignored: not installed here (pip install {name})")
    return [*words[:place], "none", *words[place + 1 :]]


def _asks_for_lora(words: list[str]) -> bool:
    """Whether the last `--lora_enable` of a command line is not False."""
    place = len(words) - 1 - words[::-1].index("--lora_enable")
    return [word.lower() for word in words[place + 1 : place + 2]] != ["false"]


def translate_legacy(argv: list[str]) -> tuple[list[str], list[str]]:
    """Command line with LLaVA's outdated flags renamed or dropped, and one line for each dropped one."""
    kept: list[str] = []
    notes: list[str] = []
    split = [part for word in argv for part in _split_equals(word)]
    renamed = LEGACY_RENAMED | (VHM_RENAMED if "--list_file" in split else {})
    words = iter(split)
    dropping = layers = False
    for word in words:
        if word == "--tune_entire_model":  # VHM's word for everything, the tower included
            value = next(words, "True")
            everything = ["--lora_enable", "False", "--tune_vision_tower", "True"]
            kept += everything if value.lower() == "true" else []
            continue
        if word.startswith("--"):
            layers = word == "--mm_vision_select_layer"
            dropping = word in LEGACY_DROPPED
            if dropping:
                notes.append(f"{word} is ignored: {LEGACY_DROPPED[word]}")
            word = renamed.get(word, word)
            kept += [] if dropping else [word]
        elif not dropping:
            kept += word.strip("[]").replace(",", " ").split() if layers else [word]
    return kept, notes


def _split_equals(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--") and "=" in word else [word]


def without_effect(argv: list[str], model: ModelArguments, training: TrainingArguments) -> list[str]:
    """One line for each flag that changes nothing here, or not what it changes in LLaVA."""
    given = {word.split("=")[0].replace("-", "_").lstrip("_") for word in argv if word.startswith("--")}
    lora, notes = training.lora_enable, []
    if "lora_enable" not in given:
        notes.append(
            "LoRA is the default here; --lora_enable False trains the model itself, as LLaVA does unasked"
        )
    frozen = model.projector_is_frozen(lora)
    if frozen and "mm_projector_lr" in given:
        notes.append(
            "--mm_projector_lr has no effect: the projector is frozen (--tune_mm_mlp_adapter True trains it)"
        )
    if lora and (model.freeze_backbone or model.freeze_mm_mlp_adapter):
        notes.append("--freeze_backbone and --freeze_mm_mlp_adapter have no effect with LoRA")
    if not lora and training.use_dora:
        notes.append("--use_dora has no effect without LoRA")
    if not model.tune_vision_tower:
        flags = (
            {"tune_vit_from_layer"} if training.vision_lora_r else {"tune_vit_from_layer", "vision_tower_lr"}
        )
        named = sorted(flags & given)
        notes += [f"--{flag} has no effect without --tune_vision_tower True" for flag in named]
    return notes
