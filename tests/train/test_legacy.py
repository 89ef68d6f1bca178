"""Command lines of the originals, as their scripts have them but for the paths: each parses to its recipe, and every
flag that means nothing here is named in one line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from geochat.train.command_line import parse_arguments
from geochat.train.presets import PRESETS

COMMON = """--mm_projector_type mlp2x_gelu --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
--output_dir ./checkpoints/out --num_train_epochs 1 --per_device_eval_batch_size 4 --evaluation_strategy no
--save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
--model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True"""
LLAVA_LORA = """--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --model_name_or_path
    lmsys/vicuna-7b-v1.5 --version v1 --data_path ./playground/data/llava_v1_5_mix665k.json
    --image_folder ./playground/data --vision_tower openai/clip-vit-large-patch14-336 --pretrain_mm_mlp_adapter
    ./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin --mm_vision_select_layer -2 --image_aspect_ratio pad
    --group_by_modality_length True --save_strategy steps --save_steps 50000 --learning_rate 2e-4
    --dataloader_num_workers 4"""

COMMANDS = {
    "llava_pretrain": """--model_name_or_path lmsys/vicuna-13b-v1.5 --version plain
        --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
        --image_folder ./playground/data/LLaVA-Pretrain/images --vision_tower openai/clip-vit-large-patch14-336
        --tune_mm_mlp_adapter True --mm_vision_select_layer -2 --per_device_train_batch_size 32
        --gradient_accumulation_steps 1 --save_strategy steps --save_steps 24000 --learning_rate 1e-3
        --dataloader_num_workers 4 --report_to wandb""",
    "llava_lora": f"{LLAVA_LORA} --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --report_to wandb",
    "llava_qlora": """--lora_enable True --bits 4 --model_name_or_path ./checkpoints/vicuna-v1-3-7b --version v1
        --data_path ./playground/data/llava_instruct_80k.json --image_folder /path/to/coco/train2017
        --vision_tower openai/clip-vit-large-patch14 --mm_vision_select_layer -2 --pretrain_mm_mlp_adapter
        ./checkpoints/llava-vicuna-v1-3-7b-pretrain/mm_projector.bin --per_device_train_batch_size 16
        --gradient_accumulation_steps 1 --save_strategy steps --save_steps 50000 --learning_rate 2e-5
        --dataloader_num_workers 4 --report_to wandb""",
    # DoRA's own line says so by the name of its program alone, train_mem_dora.py: the last flag is added.
    "dora": f"{LLAVA_LORA} --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --use_dora True",
    "vhm_pretrain": """--model_name_or_path lmsys/vicuna-7b-v1.5 --version plain --data_path ~/dataset/vhm/pretrain
        --list_file ~/dataset/vhm/pretrain/list_pretrain.json --vision_tower openai/clip-vit-large-patch14-336
        --tune_entire_model true --tune_vit_from_layer -1 --mm_vision_select_layer 8 16 24
        --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --save_strategy steps --save_steps 2000
        --learning_rate 2e-5 --dataloader_num_workers 4 --report_to tensorboard --run_name vhm-7b_prtrained""",
    "vhm_finetune": """--model_name_or_path ~/cks/vhm-7b_pretrained --version v1 --data_path ~/dataset/vhm/sft
        --vision_tower ~/cks/vhm-7b_pretrained/vision_tower --list_file ~/dataset/vhm/sft/list_sft.json
        --mm_vision_select_layer 8 16 24 --image_aspect_ratio pad --group_by_modality_length True
        --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --save_strategy steps --save_steps 2000
        --learning_rate 2e-5 --dataloader_num_workers 4 --report_to tensorboard --run_name vhm-7b_sft""",
    "geochat": """--lora_enable True --model_name_or_path path/to/base/llavav1.5-7b --version v1
        --data_path path/to/GeoChat_Instruct.json --image_folder final_images_llava
        --vision_tower openai/clip-vit-large-patch14-336 --pretrain_mm_mlp_adapter
        path/to/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin --mm_vision_select_layer -2
        --image_aspect_ratio pad --per_device_train_batch_size 32 --gradient_accumulation_steps 1
        --save_strategy epoch --save_steps 7000 --learning_rate 2e-4 --dataloader_num_workers 16 --report_to wandb""",
}
"""As published in LLaVA's scripts/v1_5 and finetune_qlora.sh, DoRA's Dora_7b.sh, VHM's two SLURM scripts and GeoChat's
finetune_lora.sh, without the launcher and `--deepspeed`, which asks for one; COMMON is what all of them share."""
EXPECTED: dict[str, dict[str, Any]] = {
    "llava_pretrain": {"lora_enable": False, "tune_mm_mlp_adapter": True, "version": "plain", "learning_rate": 1e-3,
                       "image_aspect_ratio": "square"},
    "llava_lora": {"lora_r": 128, "lora_alpha": 256, "mm_projector_lr": 2e-5, "group_by_modality_length": True,
                   "tune_mm_mlp_adapter": True, "use_dora": False, "image_aspect_ratio": "pad"},
    "llava_qlora": {"bits": 4, "quantization": "4bit", "lora_r": 64, "learning_rate": 2e-5},
    "dora": {"use_dora": True, "lora_r": 128, "lora_alpha": 256, "mm_projector_lr": 2e-5, "tune_mm_mlp_adapter": True,
             "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "vhm_pretrain": {"lora_enable": False, "tune_vision_tower": True, "tune_vit_from_layer": None,
                     "feature_layer": [8, 16, 24], "version": "plain", "learning_rate": 2e-5,
                     "image_aspect_ratio": "square", "image_folder": ["~/dataset/vhm/pretrain"],
                     "data_path": ["~/dataset/vhm/pretrain/list_pretrain.json"]},
    "vhm_finetune": {"lora_enable": False, "feature_layer": [8, 16, 24], "version": "vicuna_v1", "tune_vision_tower": False,
                     "image_folder": ["~/dataset/vhm/sft"], "data_path": ["~/dataset/vhm/sft/list_sft.json"]},
    "geochat": {"lora_enable": True, "tune_mm_mlp_adapter": False, "lora_r": 64, "lora_alpha": 16, "per_device_train_batch_size": 32,
                "feature_layer": -2, "version": "vicuna_v1", "image_aspect_ratio": "pad"},
}  # fmt: skip
IGNORED = {"--mm_use_im_patch_token", "--lazy_preprocess"}
ALSO_IGNORED = {"vhm_pretrain": {"--run_name"}, "vhm_finetune": {"--run_name"}}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line_parses_to_its_recipe(name: str) -> None:
    model, data, args = parse_arguments(shlex.split(f"{COMMANDS[name]} {COMMON} --use_cpu True"))
    for flag, value in EXPECTED[name].items():
        owner = next(part for part in (model, data, args) if hasattr(part, flag))
        assert getattr(owner, flag) == value, flag
    assert (args.warmup_steps, args.weight_decay, str(args.lr_scheduler_type.value)) == (0.03, 0.0, "cosine")
    assert "504 px" in " ".join(args.notes)
    named = {note.split()[0] for note in args.notes if " is ignored: " in note}
    assert named - {"--report_to"} == IGNORED | ALSO_IGNORED.get(name, set())


def test_a_logger_that_is_absent_ends_no_run_of_an_original_line() -> None:
    words = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
    words += ["--report_to", "no_such_logger"]
    with pytest.raises(ValueError, match="--report_to no_such_logger: not installed"):
        parse_arguments(words)
    _, _, args = parse_arguments([*words, "--lazy_preprocess", "True"])
    assert args.report_to == []
    assert "--report_to no_such_logger is ignored" in " ".join(args.notes)


def test_lora_switched_off_switches_off_what_came_with_it() -> None:
    words = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
    legacy = ["--lora_enable", "False", "--mm_projector_lr", "2e-5", "--lazy_preprocess", "True"]
    model, _, args = parse_arguments([*words, *legacy])
    assert (args.lora_enable, model.tune_mm_mlp_adapter) == (False, False)


@pytest.mark.parametrize("spelling", [["8", "16", "24"], ["8,16,24"], ["[8, 16, 24]"], ["[8,16,24]"]])
def test_lists_of_states_in_every_spelling(spelling: list[str]) -> None:
    words = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    model, _, _ = parse_arguments([*words, "--mm_vision_select_layer", *spelling, "--use_cpu", "True"])
    assert model.feature_layer == [8, 16, 24]


def test_xtuners_configuration_in_our_flags_is_the_preset_made_from_it() -> None:
    """The first command of docs/xtuner.md against GeoChat-Bench's preset, whose batch is another."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "xtuner.md").read_text(encoding="utf-8")
    words = shlex.split(page.split("```bash\n")[1].split("```")[0].replace("\\\n", " "))
    flags = words[words.index("geochat.train.train") + 1 :]
    del flags[: flags.index("--model_name_or_path")]  # --deepspeed asks for a launcher
    parsed = parse_arguments([*flags, "--use_cpu", "True"])
    assert parsed[2].per_device_train_batch_size == 16
    for flag, value in PRESETS["geochat_bench_qlora"].flags.items():
        if flag not in ("global_batch_size", "lr_scheduler_type", "gradient_checkpointing"):
            assert getattr(next(part for part in parsed if hasattr(part, flag)), flag) == value, flag


def test_a_preset_stands_behind_the_flags() -> None:
    words = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
    model, _, args = parse_arguments([*words, "--preset", "dora", "--lora_r", "16", "--image_size=504"])
    assert (args.lora_r, args.lora_alpha, model.image_size, args.use_dora) == (16, 256, 504, True)
    assert (args.global_batch_size, args.gradient_accumulation_steps) == (128, 8)
    _, _, args = parse_arguments([*words, "--gradient_accumulation_steps", "3", "--preset", "dora"])
    assert (args.global_batch_size, args.gradient_accumulation_steps) == (None, 3)
    assert "instead of the preset's global batch of 128" in " ".join(args.notes)
