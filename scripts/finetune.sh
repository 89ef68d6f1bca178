#!/usr/bin/env bash
# Full fine-tuning: language model and projector train, the vision tower stays. Same variables as finetune_lora.sh.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 144 "$scripts/zero3.json" --preset geochat_full "$@"
