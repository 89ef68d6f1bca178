#!/usr/bin/env bash
# Run an exported model in llama.cpp and compare with geochat: ids of the prompts, image features, greedy tokens.
#
#   bash scripts/check_gguf.sh
#
# The first run compiles what it needs of llama-cpp-python in an environment of its own (a quarter of an hour on two
# cores; a C++ compiler is needed). It is no part of scripts/test.sh. The last line says PASSED or FAILED.
#
# Environment:
#   MODEL            canonical folder to export (default playground/nano)
#   OUT              where files go (default playground/runs/gguf)
#   SCENES           pictures of each shape (default 3)
#   LLAMACPP_VENV    environment with llama-cpp-python (default OUT/llamacpp-venv, made when it is not there)
#   LLAMACPP         its release (default 0.3.36)
#   AS_RELEASED=1    compile the release as it is. Its llama.cpp puts CLIP's class token after the patches and takes the
#                    wrong rows afterwards (ggml-org/llama.cpp#25814); by default that one line is mended first.
#   CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL   for the compilation (default: little optimisation, all cores)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL="${MODEL:-playground/nano}"
OUT="${OUT:-playground/runs/gguf}"
LLAMACPP="${LLAMACPP:-0.3.36}"
LLAMACPP_VENV="${LLAMACPP_VENV:-$OUT/llamacpp-venv}"
[ -f "$MODEL/config.json" ] || { echo "error: MODEL=$MODEL: no model there" >&2; exit 2; }
mkdir -p "$OUT"

build() {
    local source="$OUT/llamacpp-source" made="$OUT/llamacpp-build" venv="$LLAMACPP_VENV.new" packages file
    local theirs='inp = ggml_concat(ctx0, inp, model.class_embedding, 1);'
    local mended='inp = ggml_concat(ctx0, model.class_embedding, inp, 1);'
    rm -rf "$source" "$venv"
    mkdir -p "$source"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet cmake ninja numpy jinja2 diskcache typing-extensions pillow
    "$venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$source" \
        "llama-cpp-python==$LLAMACPP"
    tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components 1
    if [ -z "${AS_RELEASED:-}" ]; then
        file="$source/vendor/llama.cpp/tools/mtmd/models/llava.cpp"
        grep -qF "$theirs" "$file" || { echo "error: $file: another release; AS_RELEASED=1 takes it as it is" >&2; exit 2; }
        sed -i "s/$theirs/$mended/" "$file"
    fi
    # Two libraries of many: installing the package would compile all of llama.cpp's tools as well.
    packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')"
    # shellcheck disable=SC2086
    "$venv/bin/cmake" -S "$source" -B "$made" -G Ninja -DCMAKE_MAKE_PROGRAM="$(realpath "$venv/bin/ninja")" \
        -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PLATLIB_DIR="$OUT" -DLLAMA_OPENSSL=OFF \
        ${CMAKE_ARGS:--DGGML_NATIVE=OFF -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1}
    "$venv/bin/cmake" --build "$made" --target llama mtmd
    cp -r "$source/llama_cpp" "$packages"
    mkdir -p "$packages/llama_cpp/lib"
    find "$made" -name 'lib*.so*' -exec cp -L {} "$packages/llama_cpp/lib" ';'
    mv "$venv" "$LLAMACPP_VENV"
}

if [ ! -x "$LLAMACPP_VENV/bin/python" ]; then
    echo "compiling llama-cpp-python $LLAMACPP into $LLAMACPP_VENV (log: $OUT/compilation.log)"
    build > "$OUT/compilation.log"
fi
(
    source scripts/venv.sh gguf
    python scripts/gguf/expected.py --model "$MODEL" --out "$OUT/files" --scenes "${SCENES:-3}"
)
if ! "$LLAMACPP_VENV/bin/python" scripts/gguf/llamacpp.py "$OUT/files" 2> "$OUT/llamacpp.log"; then
    tail -n 1 "$OUT/llamacpp.log" >&2
    exit 1
fi
