#!/usr/bin/env bash
# VHM's second stage: language model and projector train on instructions. MODEL is the run folder of vhm_pretrain.sh.
# Same variables as finetune_lora.sh.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 128 "$scripts/zero3.json" --preset vhm_finetune "$@"
