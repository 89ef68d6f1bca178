#!/usr/bin/env bash
# Do folders that this project writes load and compute the same in plain transformers, release by release?
#   bash scripts/check_compat.sh
# Makes one environment per release (some 900 MB each, kept for the next run), writes the folders and references with
# our own environment, checks each release, prints a Markdown table, and exits with 1 when a check fails.
# COMPAT_RELEASES  releases of transformers; "newest": what the package index has ("4.57.6 5.16.1 5.20.2 newest")
# COMPAT_HOME      folder for the environments and the work (playground/runs/compat)
# GEOCHAT_ASSETS   folder that holds golden/; the model at 504 px is left out without it
# GEOCHAT_VENV, PYTHON  as in scripts/venv.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh eval
releases="${COMPAT_RELEASES:-4.57.6 5.16.1 5.20.2 newest}"
home="${COMPAT_HOME:-playground/runs/compat}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Same arithmetic and same pictures on both sides: only transformers, and what it brings along, differs.
pins=$(grep -E '^(torch|pillow|numpy|safetensors|sentencepiece|protobuf|Jinja2)==' constraints.txt)

newest() {
    pip index versions transformers 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p' || true
}

environment() {  # RELEASE: makes its environment unless it is there and complete
    local venv="$home/transformers-$1"
    [ "$(cat "$venv/complete" 2>/dev/null)" != "$pins" ] || return 0
    echo "installing transformers $1 into $venv" >&2
    rm -rf "$venv"
    python -m venv "$venv"
    # shellcheck disable=SC2086
    "$venv/bin/pip" install --quiet $pins "transformers==$1"
    echo "$pins" > "$venv/complete"
}

mkdir -p "$home"
wanted=()
for release in $releases; do
    if [ "$release" = newest ]; then
        release=$(newest)
        if [ -z "$release" ]; then
            echo "error: the package index does not tell the newest release; name it in COMPAT_RELEASES" >&2
            exit 2
        fi
    fi
    wanted+=("$release")
done
for release in "${wanted[@]}"; do environment "$release"; done

python scripts/compat/make.py --output "$home/reference"
reports=()
for release in "${wanted[@]}"; do
    report="$home/report-$release.json"
    rm -f "$report"
    # Outside the checkout's import path: the release under test must not find geochat.
    env -u PYTHONPATH "$home/transformers-$release/bin/python" scripts/compat/check.py \
        --reference "$home/reference" --report "$report" > "$home/check-$release.log" 2>&1 || true
    if [ ! -f "$report" ]; then
        echo "error: the check of transformers $release did not finish; see $home/check-$release.log" >&2
        exit 1
    fi
    reports+=("$report")
done
python scripts/compat/table.py "${reports[@]}"
