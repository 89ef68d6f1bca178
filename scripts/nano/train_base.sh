#!/usr/bin/env bash
# Train the nano base model from nothing, as it is kept in playground/nano: vision tower, tokenizer, then language model
# and projector together. About two hours on two cores; every stage goes on where it was stopped.
#
#   bash scripts/nano/train_base.sh
#
# Environment:
#   OUT     working folder (default playground/runs/nano)
#   TARGET  folder of the finished model (default $OUT/base; playground/nano holds the one that was kept)
#   TOWER_STEPS, SCENES, EPOCHS   shorter or longer training
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/venv.sh train,eval
OUT="${OUT:-playground/runs/nano}"
TARGET="${TARGET:-$OUT/base}"

[ -f "$OUT/tower/model.safetensors" ] ||
    python scripts/nano/pretrain_tower.py --output "$OUT/tower" --cache "$OUT/scenes" --steps "${TOWER_STEPS:-2200}"
[ -f "$OUT/llm/model.safetensors" ] ||
    python scripts/nano/make_llm.py --output "$OUT/llm"
[ -f "$OUT/data/train.json" ] ||
    python -m geochat.data.synthetic_tasks --output "$OUT/data" --train "${SCENES:-24000}" --test 0 --seed 100000000
python -m geochat.train.train \
    --model_name_or_path "$OUT/llm" --vision_tower "$OUT/tower" --image_size 84 \
    --data_path "$OUT/data/train.json" --image_folder "$OUT/data/images" --output_dir "$OUT/full" \
    --lora_enable False --learning_rate 1.5e-3 --weight_decay 0.01 --warmup_steps 100 --adam_beta2 0.98 \
    --num_train_epochs "${EPOCHS:-2}" --per_device_train_batch_size 32 --loss_normalization token \
    --gradient_checkpointing False --logging_steps 20 --save_steps 300 --dataloader_num_workers 1 \
    --resume_from_checkpoint True
python scripts/nano/keep.py "$OUT/full" "$TARGET"
