#!/usr/bin/env bash
# GeoChat's recipe: LoRA on every linear layer of the language model, 504 px, global batch 144, bf16, ZeRO-3.
#
#   MODEL=llava-v1.5-7b VISION_TOWER=clip-vit-large-patch14-336 DATA=GeoChat_Instruct.json IMAGES=images \
#       OUTPUT=runs/geochat-lora bash scripts/finetune_lora.sh
#
# The values are the preset's (geochat/train/presets.py); flags given to this script are passed on and win. See
# scripts/launch.sh for the environment variables.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 144 "$scripts/zero3.json" --preset geochat_lora "$@"
