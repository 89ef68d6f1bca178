#!/usr/bin/env bash
# What GeoChat's own script ran: as finetune_lora.sh, but global batch 96 (three GPUs with 32 samples each) and ZeRO-2.
# MICRO_BATCH=32 GPUS=3 is the original's layout. Same variables as finetune_lora.sh.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 96 "$scripts/zero2.json" --preset geochat_lora_script "$@"
