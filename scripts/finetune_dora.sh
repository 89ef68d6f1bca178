#!/usr/bin/env bash
# DoRA's LLaVA-1.5 recipe: DoRA on every linear layer of the language model, projector trained at a tenth of the rate,
# 336 px. MODEL is Vicuna-7B-v1.5, PROJECTOR the first stage's. Same variables as finetune_lora.sh.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 128 "$scripts/zero3.json" --preset dora "$@"
