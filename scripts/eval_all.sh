#!/usr/bin/env bash
# Runs every benchmark whose files are there, with the model loaded once, scores it and writes its page; then one table
# and one page over all of them. What is missing is named, with the place to get it. One that fails does not stop the
# others; the table says why, and the exit code is then 1. The same command goes on where it was stopped.
#
#   bash scripts/eval_all.sh MODEL DATA_ROOT [FLAG …]      # flags of geochat.eval.run, as --model-base BASE
#
# Environment:
#   OUTPUT  folder for answers, scores and pages (default runs/eval-MODEL)
#   GPUS    processes, each with its own GPU (default: those of CUDA_VISIBLE_DEVICES, else the machine's, or 1)
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/launch.sh"
[ $# -ge 2 ] || fail "two arguments are needed: the model's folder and the folder of the benchmarks' data"
model="$1" data="$2"
shift 2
[ -e "$model" ] || fail "$model: no model there"
export GEOCHAT_BENCHMARKS="$data" TOKENIZERS_PARALLELISM=false
output="${OUTPUT:-runs/eval-$(basename "$model")}"
gpus="${GPUS:-$(count_gpus)}"
start=(python)
[ "$gpus" = 1 ] || start=(torchrun --standalone --nproc-per-node "$gpus")

found="$(python -m geochat.eval.suite find "$data")"
[ -n "$found" ] || fail "$data: the files of no benchmark are there"
mapfile -t names <<< "$found"
status=0
"${start[@]}" -m geochat.eval.run_all --model-path "$model" --output "$output" "$@" --benchmarks "${names[@]}" ||
    status=$?
python -m geochat.eval.suite index "$output" "${names[@]}" || status=1
echo "written: $output/summary.md, $output/index.html"
exit "$status"
