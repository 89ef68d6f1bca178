#!/usr/bin/env bash
# The whole way once, on a CPU and with nothing but this repository: install, draw data, check it, fine-tune with LoRA,
# merge, score base against fine-tuned, answer questions about one picture. Ends with the page of pictures to look at.
#
#   bash scripts/quickstart.sh
#
# Environment:
#   OUT     folder of this run (default playground/runs/quickstart; what an earlier quickstart left there is replaced)
#   TRAIN   training scenes (default 2400)
#   TEST    test scenes, one question of every task on each (default 150)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh train,eval
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONWARNINGS=ignore
OUT="${OUT:-playground/runs/quickstart}"
BASE=playground/nano
started=$SECONDS

step() {
    echo
    echo "== [$((SECONDS - started)) s] $*"
}

if [ -d "$OUT" ] && [ -n "$(ls -A "$OUT")" ] && [ ! -f "$OUT/.quickstart" ]; then
    echo "error: OUT=$OUT is not empty and no earlier quickstart's folder: name another one" >&2
    exit 2
fi
mkdir -p "$OUT"
touch "$OUT/.quickstart"
rm -rf "$OUT"/{data,adapter,merged,scores-base,scores-merged,report,answer.png}

step "1/7 draw aerial scenes with exact labels: $OUT/data"
python -m geochat.data.synthetic_tasks --output "$OUT/data" --train "${TRAIN:-2400}" --test "${TEST:-150}"

step "2/7 check the instruction file"
python -m geochat.data.verify "$OUT/data/train.json" --image-folder "$OUT/data/images"

step "3/7 fine-tune: nano from 84 px to 126 px, LoRA on the language model, projector trained: $OUT/adapter"
python -m geochat.train.train \
    --model_name_or_path "$BASE" --image_size 126 --tune_mm_mlp_adapter True \
    --lora_r 64 --lora_alpha 64 --learning_rate 6e-4 --mm_projector_lr 3e-4 \
    --data_path "$OUT/data/train.json" --image_folder "$OUT/data/images" --output_dir "$OUT/adapter" \
    --num_train_epochs 1 --per_device_train_batch_size 16 --loss_normalization token --group_by_modality_length True \
    --gradient_checkpointing False --logging_steps 5 --save_steps 1000 --dataloader_num_workers 1

step "4/7 merge the adapter into its base: $OUT/merged"
python scripts/merge_lora_weights.py --model-path "$OUT/adapter" --model-base "$BASE" --save-model-path "$OUT/merged" \
    --dtype float32

step "5/7 score the base and the fine-tuned model on scenes that neither has seen"
for model in base merged; do
    folder="$OUT/$model"
    [ "$model" = base ] && folder="$BASE"
    python -m geochat.eval.run --model-path "$folder" --benchmark nano \
        --questions "$OUT/data/questions.jsonl" --image-folder "$OUT/data/images" \
        --output "$OUT/scores-$model" --batch-size 64
done

step "6/7 write the page of pictures"
python -m geochat.eval.report "$OUT/scores-base" "$OUT/scores-merged" --names "base, 84 px" "fine-tuned, 126 px" \
    --output "$OUT/report"

step "7/7 ask the merged model"
picture="$OUT/data/images/test_000001.jpg"
python -m geochat.serve.cli --model-path "$OUT/merged" --image-file "$picture" \
    --query "[grounding] Describe the image in detail." --save-image "$OUT/answer.png"

echo
echo "done in $((SECONDS - started)) s after installation"
echo "  page with pictures and scores   $OUT/report/index.html"
echo "  loss curve                      $OUT/adapter/loss.png"
echo "  the answer, drawn               $OUT/answer.png"
echo "  the model                       $OUT/merged"
echo "talk to it:  source .venv/bin/activate && python -m geochat.serve.cli --model-path $OUT/merged --image-file $picture"
