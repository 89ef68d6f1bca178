#!/usr/bin/env bash
# VHM's first stage: language model, projector and the second half of the tower's blocks train on captions; the
# projector sees states 8, 16 and 24 of the tower together. MODEL is Vicuna-7B-v1.5. PROJECTOR may stay unset: LLaVA's
# file is made for one state. The run folder is a whole model, tower included. Same variables as finetune_lora.sh.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 256 "$scripts/zero3.json" --preset vhm_pretrain "$@"
