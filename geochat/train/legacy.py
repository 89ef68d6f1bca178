"""LLaVA's outdated flags: renamed ones are translated, meaningless ones are dropped with one line each."""

from __future__ import annotations

LEGACY_RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps",  # a value below 1 is a share of all steps
    "--group_by_length": "--group_by_modality_length",
    "--unfreeze_mm_vision_tower": "--tune_vision_tower",
    "--local-rank": "--local_rank",
    "--no_cuda": "--use_cpu",
}

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
    "--double_quant": "quantised training is not part of this command",
    "--quant_type": "quantised training is not part of this command",
}


def translate_legacy(argv: list[str]) -> tuple[list[str], list[str]]:
    """Command line with LLaVA's outdated flags renamed or dropped, and one line for each dropped one."""
    kept: list[str] = []
    notes: list[str] = []
    words = iter([part for word in argv for part in _split_equals(word)])
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word in LEGACY_DROPPED
            if dropping:
                notes.append(f"{word} is ignored: {LEGACY_DROPPED[word]}")
                continue
            word = LEGACY_RENAMED.get(word, word)
        if not dropping:
            kept.append(word)
    return kept, notes


def _split_equals(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--") and "=" in word else [word]
