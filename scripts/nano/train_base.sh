#!/usr/bin/env bash
# Train the nano base model from nothing, as it is kept in playground/nano: vision tower, tokenizer, projector, then
# projector and language model together. About two hours on two cores; a stopped stage goes on where it was.
#
#   bash scripts/nano/train_base.sh
#
# Environment:
#   OUT         working folder (default playground/runs/nano)
#   TARGET      folder of the finished model (default $OUT/base; playground/nano holds the one that was kept)
#   PROCESSES   processes that share each batch, one thread each (default 2)
#   TOWER_STEPS, TOWER_STEPS_2, LLM_STEPS   shorter or longer training
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/venv.sh train,eval
OUT="${OUT:-playground/runs/nano}"
TARGET="${TARGET:-$OUT/base}"
HERE=scripts/nano

train() {
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node "${PROCESSES:-2}" "$@" --cache "$OUT/scenes"
}

[ -f "$OUT/tower-first/config.json" ] ||
    train $HERE/pretrain_tower.py --output "$OUT/tower-first" --steps "${TOWER_STEPS:-2200}"
[ -f "$OUT/tower/config.json" ] ||
    train $HERE/pretrain_tower.py --initial "$OUT/tower-first" --output "$OUT/tower" \
        --steps "${TOWER_STEPS_2:-1400}" --learning-rate 1e-3
[ -f "$OUT/llm/model.safetensors" ] ||
    python $HERE/make_llm.py --output "$OUT/llm"
[ -f "$OUT/projector.safetensors" ] ||
    python $HERE/align_projector.py --llm "$OUT/llm" --tower "$OUT/tower" --output "$OUT/projector.safetensors" \
        --cache "$OUT/scenes"
train $HERE/train_llm.py --llm "$OUT/llm" --tower "$OUT/tower" --projector "$OUT/projector.safetensors" \
    --output "$OUT/full" --steps "${LLM_STEPS:-4400}"
python $HERE/keep.py "$OUT/full/model" "$TARGET"
