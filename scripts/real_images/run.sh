#!/usr/bin/env bash
# The nano model on real images: AID scenes (class and description) and KIT vehicles ([refer]), scored, in one command.
#
#   DATA=/folder/with/aid150/and/kit_cars bash scripts/real_images/run.sh
#
# A stage whose output is there is skipped, a stopped one goes on where it was: the command may be given again.
#
# Environment:
#   DATA         folder that holds aid150.jsonl, aid150/, kit_cars.json, kit_cars/ (default $GEOCHAT_ASSETS/data)
#   BASE         model to start from (default playground/nano)
#   OUT          folder of the run (default playground/runs/real)
#   PARTS        "aid kit", or one of them
#   TEACHER      teacher.npz of an earlier run; "none" teaches the tower with labels alone
#   TOWER_STEPS, LLM_STEPS, KIT_STEPS   length of the three trainings
#   RECIPE       of AID's language model: "full" (default), or "lora" with the projector, merged afterwards
#   BATCH        samples for each step of the two language-model trainings (default 16)
#   WORKERS      loader processes (default 1)
#   LIMIT        ask only the first questions of each benchmark
#   WINDOWS      KIT training windows; SIZE  picture side in pixels (default 126)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/venv.sh train,eval,real

HERE=scripts/real_images
DATA="${DATA:-${GEOCHAT_ASSETS:+$GEOCHAT_ASSETS/data}}"
BASE="${BASE:-playground/nano}"
OUT="${OUT:-playground/runs/real}"
PARTS="${PARTS:-aid kit}"
SIZE="${SIZE:-126}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
[ -n "$DATA" ] || { echo "error: DATA is not set: folder that holds aid150/ and kit_cars/" >&2; exit 2; }
[ -d "$DATA" ] || { echo "error: DATA=$DATA: no such folder" >&2; exit 2; }
[ -f "$BASE/config.json" ] || { echo "error: BASE=$BASE: no model there (scripts/nano/train_base.sh makes one)" >&2; exit 2; }
mkdir -p "$OUT"

stage() {  # OUTPUT-FILE TITLE COMMAND…
    local output="$1" title="$2" started=$SECONDS
    shift 2
    if [ -e "$output" ]; then
        echo "== $title: there already"
        return
    fi
    echo "== $title"
    "$@"
    echo "$title,$((SECONDS - started))" >> "$OUT/seconds.csv"
}

ask() {  # MODEL BENCHMARK RUN FLAGS…
    local model="$1" benchmark="$2" run="$3"
    shift 3
    stage "$run/scores.json" "score ${run#"$OUT/"}" python -m geochat.eval.run --model-path "$model" \
        --benchmark "$benchmark" --output "$run" --batch-size 32 ${LIMIT:+--limit "$LIMIT"} "$@"
}

tune() {  # MODEL FOLDER STEPS FLAGS…
    local model="$1" folder="$2" steps="$3"
    shift 3
    python -m geochat.train.train --model_name_or_path "$model" --image_size "$SIZE" \
        --data_path "$folder/train.json" --image_folder "$folder/images" --output_dir "$folder/run" \
        --max_steps "$steps" --per_device_train_batch_size "${BATCH:-16}" --gradient_checkpointing False \
        --group_by_modality_length True --adam_beta2 0.98 --warmup_steps 0.05 --logging_steps 10 --save_steps 100 --save_total_limit 1 \
        --dataloader_num_workers "${WORKERS:-1}" --resume_from_checkpoint True "$@"
}

aid() {
    local folder="$OUT/aid" teacher="${TEACHER:-$OUT/teacher/teacher.npz}"
    stage "$OUT/probe.json" "linear probe on raw pixels" \
        python $HERE/probe.py --data "$DATA" --output "$OUT/probe.json"
    stage "$folder/train.json" "AID records" python $HERE/prepare.py aid --data "$DATA" --output "$folder"
    if [ "$teacher" != none ]; then
        stage "$teacher" "teacher" python $HERE/teacher.py --data "$DATA" --output "$(dirname "$teacher")"
    fi
    stage "$folder/base/config.json" "vision tower" env OMP_NUM_THREADS="${TOWER_THREADS:-$OMP_NUM_THREADS}" \
        python $HERE/adapt_tower.py --base "$BASE" --data "$DATA" --output "$folder/base" --test \
        --steps "${TOWER_STEPS:-1400}" $([ "$teacher" = none ] || echo --teacher "$teacher")
    local tuned="$folder/run"
    if [ "${RECIPE:-full}" = lora ]; then
        tuned="$folder/merged"
        stage "$folder/run/adapter_model.safetensors" "AID: LoRA and projector" \
            tune "$folder/base" "$folder" "${LLM_STEPS:-1600}" --tune_mm_mlp_adapter True \
            --lora_r 32 --lora_alpha 64 --lora_dropout 0 --learning_rate 1e-3
        stage "$tuned/config.json" "merge" python scripts/merge_lora_weights.py \
            --model-path "$folder/run" --model-base "$folder/base" --save-model-path "$tuned"
    else
        stage "$folder/run/config.json" "AID: language model and projector" \
            tune "$folder/base" "$folder" "${LLM_STEPS:-1600}" --lora_enable False --learning_rate 1e-3
    fi
    local questions=(--questions "$folder/questions.jsonl" --image-folder "$folder/images")
    ask "$BASE" aid "$folder/eval/base" "${questions[@]}"
    ask "$tuned" aid "$folder/eval/tuned" "${questions[@]}"
    stage "$folder/report/index.html" "pictures" python -m geochat.eval.report "$folder/eval/base" \
        "$folder/eval/tuned" --names base tuned --benchmark aid --image-folder "$folder/images" --output "$folder/report"
}

kit() {
    local folder="$OUT/kit"
    stage "$folder/train.json" "KIT records" python $HERE/prepare.py kit --data "$DATA" --output "$folder" \
        --windows "${WINDOWS:-6000}"
    stage "$folder/run/config.json" "KIT: tower, projector and language model" \
        tune "$BASE" "$folder" "${KIT_STEPS:-260}" --lora_enable False --tune_vision_tower True \
        --learning_rate 5e-4 --vision_tower_lr 3e-4 --loss_normalization token
    local toml="$folder/kit_cars.toml"
    ask "$BASE" "$toml" "$folder/eval/base"
    ask "$folder/run" "$toml" "$folder/eval/tuned"
    stage "$folder/report/index.html" "pictures" python -m geochat.eval.report "$folder/eval/base" \
        "$folder/eval/tuned" --names base tuned --benchmark "$toml" --output "$folder/report"
}

for part in $PARTS; do
    case "$part" in
        aid | kit) "$part" ;;
        *) echo "error: PARTS=$PARTS: choose from aid and kit" >&2; exit 2 ;;
    esac
done
answers="$DATA/geochat_bench_answers/AID_geochat_7b.jsonl"
python $HERE/figures.py --output "$OUT" $([ ! -f "$answers" ] || echo --geochat "$answers")
echo "table: $OUT/figures.md   pictures: $OUT/*/report/index.html   seconds: $OUT/seconds.csv"
