# Sourced by the other scripts: makes .venv when it is absent, installs geochat into it, activates it.
#   source scripts/venv.sh train,eval
# GEOCHAT_VENV  folder of the environment (default: .venv beside the scripts); "none": use the python that is active
# PYTHON        interpreter that creates it (default: the first of python3.11 … python3 that is 3.11 or newer)
# Nothing is installed again while pyproject.toml, constraints.txt and the extras are as they were.

geochat_venv() {
    local root extras venv python stamp mark
    [ "${GEOCHAT_VENV:-}" != none ] || return 0
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    extras="$1"
    venv="${GEOCHAT_VENV:-$root/.venv}"
    if [ ! -x "$venv/bin/python" ]; then
        python=""
        for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "error: no Python 3.11 or newer found; name one: PYTHON=/path/to/python3.11 bash $0" >&2
            return 2
        fi
        if [ -e "$venv" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
            echo "error: $venv is there, but is no environment (no bin/python); name another GEOCHAT_VENV" >&2
            return 2
        fi
        echo "creating $venv with $("$python" --version)"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            echo "error: $python cannot create an environment; install its venv package" >&2
            return 2
        fi
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    mark="$venv/.geochat-$(echo "$extras" | tr ',' '-')"
    stamp="$root $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if [ "$(cat "$mark" 2>/dev/null)" != "$stamp" ]; then
        echo "installing geochat[$extras] into $venv"
        if ! pip install --quiet --editable "$root[$extras]" --constraint "$root/constraints.txt"; then
            echo "error: the installation failed; the lines above say why" >&2
            return 2
        fi
        echo "$stamp" > "$mark"
    fi
}

geochat_venv "${1:?usage: source scripts/venv.sh EXTRAS}" || exit 2
