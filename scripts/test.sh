#!/usr/bin/env bash
# Lint, format, types and tests; sets up .venv first when needed.
#   bash scripts/test.sh                 everything
#   bash scripts/test.sh tests/data -x   the same checks, pytest with these arguments
# GEOCHAT_TEST_WORKERS  processes of pytest for the full run (default: number of cores, at most 4)
# GEOCHAT_ASSETS        folder that holds golden/; tests that need it are skipped without it
# GEOCHAT_ALL_TESTS=1   the long variants too
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
source scripts/venv.sh train,eval,quant,gguf,geo,serve,dev

# Several processes with one thread each beat one process whose threads fight over small tensors.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-}"

results=()
failed=0
check() {  # NAME COMMAND…
    local name="$1" start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@"; then
        results+=("$name ok ($((SECONDS - start)) s)")
    else
        results+=("$name FAILED ($((SECONDS - start)) s)")
        failed=1
    fi
}

check lint ruff check .
check format ruff format --check .
check types mypy
if [ $# -gt 0 ]; then
    check tests python -m pytest -q "$@"
else
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    # The longest tests stand last: a worker that has nothing left takes some of another.
    check tests python -m pytest -q --dist worksteal -n "${GEOCHAT_TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
fi

summary=$(printf '%s, ' "${results[@]}")
echo "test.sh: ${summary%, }; $([ $failed = 0 ] && echo PASSED || echo FAILED) in $SECONDS s"
exit $failed
