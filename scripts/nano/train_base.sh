#!/usr/bin/env bash
# Train the nano base model from nothing, as it is kept in playground/nano: vision tower, tokenizer, projector, then
# projector and language model together. A few hours on two cores; a stopped stage goes on where it was.
#
#   bash scripts/nano/train_base.sh
#
# Environment:
#   OUT     working folder (default playground/runs/nano)
#   TARGET  folder of the finished model (default $OUT/base; playground/nano holds the one that was kept)
#   TOWER_STEPS, LLM_STEPS   shorter or longer training
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/venv.sh train,eval
OUT="${OUT:-playground/runs/nano}"
TARGET="${TARGET:-$OUT/base}"
HERE=scripts/nano

[ -f "$OUT/tower/config.json" ] ||
    python $HERE/pretrain_tower.py --output "$OUT/tower" --cache "$OUT/scenes" --steps "${TOWER_STEPS:-2200}"
[ -f "$OUT/llm/model.safetensors" ] ||
    python $HERE/make_llm.py --output "$OUT/llm"
[ -f "$OUT/projector.safetensors" ] ||
    python $HERE/align_projector.py --llm "$OUT/llm" --tower "$OUT/tower" --output "$OUT/projector.safetensors" \
        --cache "$OUT/scenes"
python $HERE/train_llm.py --llm "$OUT/llm" --tower "$OUT/tower" --projector "$OUT/projector.safetensors" \
    --output "$OUT/full" --cache "$OUT/scenes" --steps "${LLM_STEPS:-3000}"
python $HERE/keep.py "$OUT/full/model" "$TARGET"
