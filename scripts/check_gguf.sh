#!/usr/bin/env bash
# Run an exported model in llama.cpp and compare with geochat: ids of the prompts, image features, greedy tokens.
#
#   bash scripts/check_gguf.sh
#
# The first run compiles llama-cpp-python in an environment of its own (half an hour on two cores). It is no part of
# scripts/test.sh. The last line says PASSED or FAILED.
#
# Environment:
#   MODEL            canonical folder to export (default playground/nano)
#   OUT              where files go (default playground/runs/gguf)
#   SCENES           pictures of each shape (default 3)
#   LLAMACPP_VENV    environment with llama-cpp-python (default OUT/llamacpp-venv, made when it is not there)
#   LLAMACPP         its release (default 0.3.36)
#   AS_RELEASED=1    compile the release as it is. Its llama.cpp puts CLIP's class token after the patches and takes the
#                    wrong rows afterwards (ggml-org/llama.cpp issue 25814); by default that one line is mended first.
#   CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL   for the compilation
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL="${MODEL:-playground/nano}"
OUT="${OUT:-playground/runs/gguf}"
LLAMACPP="${LLAMACPP:-0.3.36}"
LLAMACPP_VENV="${LLAMACPP_VENV:-$OUT/llamacpp-venv}"
[ -f "$MODEL/config.json" ] || { echo "error: MODEL=$MODEL: no model there" >&2; exit 2; }
mkdir -p "$OUT"

build() {
    local source="$OUT/llamacpp-source" line=tools/mtmd/models/llava.cpp
    local theirs='inp = ggml_concat(ctx0, inp, model.class_embedding, 1);'
    local mended='inp = ggml_concat(ctx0, model.class_embedding, inp, 1);'
    python3 -m venv "$LLAMACPP_VENV.new"
    rm -rf "$source"
    mkdir -p "$source"
    "$LLAMACPP_VENV.new/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$source" \
        "llama-cpp-python==$LLAMACPP"
    tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components 1
    if [ -z "${AS_RELEASED:-}" ]; then
        line="$source/vendor/llama.cpp/$line"
        grep -qF "$theirs" "$line" || { echo "error: $line: another release; AS_RELEASED=1 compiles it as it is" >&2; exit 2; }
        sed -i "s/$theirs/$mended/" "$line"
    fi
    CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1}" \
        CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" \
        "$LLAMACPP_VENV.new/bin/pip" install --quiet "$source" pillow
    mv "$LLAMACPP_VENV.new" "$LLAMACPP_VENV"
}

if [ ! -x "$LLAMACPP_VENV/bin/python" ]; then
    echo "compiling llama-cpp-python $LLAMACPP into $LLAMACPP_VENV"
    build
fi
(
    source scripts/venv.sh gguf
    python scripts/gguf/expected.py --model "$MODEL" --out "$OUT/files" --scenes "${SCENES:-3}"
)
"$LLAMACPP_VENV/bin/python" scripts/gguf/llamacpp.py "$OUT/files" 2> "$OUT/llamacpp.log"
