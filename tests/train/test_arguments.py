"""Flags: LLaVA's names, GeoChat's recipe as defaults, one clear line for what cannot be."""

from __future__ import annotations

import shlex

import pytest

from geochat.train.batch_size import accumulation_for
from geochat.train.command_line import parse_arguments
from geochat.train.legacy import translate_legacy

NEEDED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]

# The command of GeoChat's scripts/finetune_lora.sh, word for word but for the paths.
GEOCHAT_COMMAND = shlex.split("""
--lora_enable True --model_name_or_path vicuna --version v1 --data_path d.json --image_folder images
--vision_tower clip --mm_projector_type mlp2x_gelu --pretrain_mm_mlp_adapter p.bin --mm_vision_select_layer -2
--mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad --bf16 True --output_dir out
--num_train_epochs 1 --per_device_train_batch_size 18 --per_device_eval_batch_size 4
--gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy epoch --save_steps 7000
--save_total_limit 1 --learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True
--dataloader_num_workers 16 --report_to none
""")


def test_geochats_own_command_line_parses() -> None:
    model, data, args = parse_arguments(GEOCHAT_COMMAND)
    assert model.version == "vicuna_v1"
    assert data.image_aspect_ratio == "pad"
    assert (args.warmup_steps, str(args.eval_strategy.value), args.per_device_train_batch_size) == (
        0.03,
        "no",
        18,
    )
    notes = " ".join(args.notes)
    assert "--lazy_preprocess is ignored" in notes
    assert "--mm_use_im_patch_token is ignored" in notes


def test_the_recipe_is_the_default() -> None:
    model, data, args = parse_arguments(NEEDED)
    assert (args.lora_enable, args.lora_r, args.lora_alpha, args.lora_dropout) == (True, 64, 16, 0.05)
    assert (args.learning_rate, args.warmup_steps, args.weight_decay, args.num_train_epochs) == (
        2e-4,
        0.03,
        0.0,
        1,
    )
    assert args.lr_scheduler_type == "cosine"
    assert args.gradient_checkpointing
    assert args.model_max_length == 2048
    assert not model.tune_mm_mlp_adapter
    assert data.on_bad_sample == "error"
    assert args.loss_normalization == "micro_batch"


def test_legacy_flags_are_renamed_or_dropped_with_their_values() -> None:
    argv = [
        "--evaluation_strategy=no",
        "--lazy_preprocess",
        "--cache_dir",
        "x",
        "--warmup_ratio",
        "0.1",
        "--bf16",
    ]
    kept, notes = translate_legacy(argv)
    assert kept == ["--eval_strategy", "no", "--warmup_steps", "0.1", "--bf16"]
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global_batch_size", "144", "--per_device_train_batch_size", "32"], "cannot be reached"),
        (["--global_batch_size", "144", "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "3"],
         "needs --gradient_accumulation_steps 9"),
        (["--bits", "3"], "--bits 3: choose 4, 8 or 16"),
        (["--bits", "4", "--lora_enable", "False"], "--bits 4 needs --lora_enable True"),
        (["--bits", "4", "--quant_type", "fp4"], "NF4 with double quantisation"),
        (["--vision_lora_r", "8", "--lora_enable", "False"], "--vision_lora_r needs"),
        (["--preset", "geochat"], "--preset geochat: choose one of geochat_lora, geochat_lora_script, "),
        (["--image_aspect_ratio", "anyres"], "--image_aspect_ratio anyres"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--mm_projector_type", "linear"], "only mlp2x_gelu"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(NEEDED + flags)


@pytest.mark.parametrize(
    ("processes", "per_device", "steps"), [(1, 16, 9), (3, 16, 3), (8, 18, 1), (9, 16, 1)]
)
def test_accumulation_keeps_the_global_batch(processes: int, per_device: int, steps: int) -> None:
    assert accumulation_for(144, per_device, 1, processes) == steps


def test_missing_paths_are_named() -> None:
    with pytest.raises(ValueError, match="--data_path is missing"):
        parse_arguments(["--model_name_or_path", "m", "--output_dir", "o"])


def test_help_says_what_every_flag_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    assert end.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in (
        "Instruction file, JSON or JSONL; or several; or a mixture file, YAML (docs/training.md). (default: None)",
        "Samples per optimizer step over all processes; the accumulation that reaches it is derived. (default: None)",
        "as LLaVA and GeoChat do; token: over the step. (default: micro_batch)",
    ):
        assert text in told


def test_flags_without_effect_are_said() -> None:
    needed = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    pretrain = ["--tune_mm_mlp_adapter", "True", "--vision_tower_lr", "1e-5", "--lora_bias", "none"]
    notes = "\n".join(parse_arguments([*needed, *pretrain])[2].notes)
    assert "--lora_enable False trains the model itself" in notes
    assert "--vision_tower_lr has no effect without --tune_vision_tower True" in notes
    assert "--lora_bias is ignored" in notes
    notes = "\n".join(parse_arguments([*needed, "--lora_enable", "True", "--mm_projector_lr=2e-5"])[2].notes)
    assert "--mm_projector_lr has no effect: the projector is frozen" in notes
    assert "LoRA is the default" not in notes
