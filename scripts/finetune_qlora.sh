#!/usr/bin/env bash
# GeoChat-Bench's recipe: the language model in 4 bits with LoRA on it, LoRA on the vision tower, projector trained,
# 336 px. MODEL is InternLM2-chat-7B, PROJECTOR XTuner's. Same variables as finetune_lora.sh. The global batch is that
# of four GPUs (16 samples × 2 steps × 4); bitsandbytes must be installed.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 128 "$scripts/zero2.json" --preset geochat_bench_qlora "$@"
