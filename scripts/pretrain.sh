#!/usr/bin/env bash
# LLaVA-1.5's first stage: only the projector trains, on captions, at 336 px. The run folder then holds
# mm_projector.safetensors, which goes into PROJECTOR= of the next stage. Same variables as finetune_lora.sh.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/launch.sh"

launch 256 "$scripts/zero2.json" --preset llava_pretrain "$@"
