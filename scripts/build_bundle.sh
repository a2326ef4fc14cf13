#!/usr/bin/env bash
# Build the program of a deploy bundle, for this machine or for others: BUNDLE/bin/TARGET/detect.
# usage: bash scripts/build_bundle.sh BUNDLE [x86_64|aarch64 …]
#        bash scripts/build_bundle.sh --headers    only ncnn's headers, for the tests that compile without linking
#
# ncnn is built from its source package on the package index, once for each version and target, into the user's cache.
# NCNN_VERSION: another version than that of requirements.lock. NCNN_SOURCE: the source package itself, a file.
# JOBS: how many compilers at once (default: one for each core). AARCH64_ROOT: see the bundle's README.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Raised when the options below change, so that no older build is taken for theirs.
RECIPE=1
COMMON=(-DCMAKE_BUILD_TYPE=Release -DNCNN_VULKAN=OFF -DNCNN_BUILD_TOOLS=OFF -DNCNN_BUILD_EXAMPLES=OFF
    -DNCNN_BUILD_BENCHMARK=OFF -DNCNN_C_API=OFF -DNCNN_BF16=OFF -DNCNN_WEIGHT_QUANT=OFF -DNCNN_SIMPLEOCV=ON)
# Without the instruction sets that speed up other precisions than fp32, fp16 and int8, or few machines.
X86_64=(-DNCNN_XOP=OFF -DNCNN_AVXVNNIINT8=OFF -DNCNN_AVXVNNIINT16=OFF -DNCNN_AVXNECONVERT=OFF -DNCNN_AVX512BF16=OFF
    -DNCNN_AVX512FP16=OFF)
AARCH64=(-DNCNN_ARM82FP16FML=OFF -DNCNN_ARM86SVE=OFF)

main() {
    [[ $# -gt 0 ]] || fail "give the folder of a bundle: bash scripts/build_bundle.sh BUNDLE [x86_64|aarch64 …]"
    local bundle=${1%/} targets=("${@:2}") target
    if [[ "$bundle" == --headers ]]; then
        command -v cmake >/dev/null || fail "cmake is missing: sudo apt install cmake"
        open_cache
        make_headers
        return
    fi
    [[ -f "$bundle/cpp/CMakeLists.txt" ]] || fail "$bundle is not a bundle: write one with python -m export.ncnn --bundle"
    [[ ${#targets[@]} -gt 0 ]] || targets=("$(uname -m)")
    for target in "${targets[@]}"; do
        check_tools "$target"
    done
    open_cache
    for target in "${targets[@]}"; do
        build_ncnn "$target"
        build_program "$bundle" "$target"
    done
}

# open_cache: set $version and $cache.
open_cache() {
    version=${NCNN_VERSION:-$(sed -n 's/^ncnn==\([0-9.]*\).*/\1/p' "$repository/requirements.lock")}
    if [[ -n "${NCNN_SOURCE:-}" ]]; then
        [[ -f "$NCNN_SOURCE" ]] || fail "NCNN_SOURCE=$NCNN_SOURCE is not a file"
        version=$(sha256sum <"$NCNN_SOURCE" | cut -c1-16)
    fi
    if [[ -n "${AARCH64_ROOT:-}" ]]; then
        AARCH64_ROOT=$(realpath "$AARCH64_ROOT")
        export AARCH64_ROOT
    fi
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/espalier/ncnn-$version
    mkdir -p "$cache"
}

# lock_cache: keep other builds of ncnn out. What is built already is used without: it appears whole or not at all.
lock_cache() {
    exec 9>"$cache/lock"
    flock -n 9 || { echo "build_bundle: waiting for another build of ncnn" >&2; flock 9; }
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# check_tools TARGET: end with one line when it cannot be built here.
check_tools() {
    local compiler=g++ package=g++
    case "$1" in
        x86_64 | aarch64) ;;
        *) fail "there is no target $1: x86_64 or aarch64" ;;
    esac
    if [[ "$1" != "$(uname -m)" ]]; then
        [[ "$1" == aarch64 ]] || fail "$1 can only be built on such a machine"
        compiler=aarch64-linux-gnu-g++ package=g++-aarch64-linux-gnu
    fi
    command -v cmake >/dev/null || fail "cmake is missing: sudo apt install cmake"
    command -v "$compiler" >/dev/null || fail "$compiler is missing: sudo apt install $package"
}

# build_ncnn TARGET: ncnn in $cache/TARGET-RECIPE, whole or not at all.
build_ncnn() {
    local target=$1 installed=$cache/$1-$RECIPE options=()
    [[ -d "$installed" ]] && return
    lock_cache
    [[ -d "$installed" ]] && return # that other build made it
    fetch_source
    echo "build_bundle: building ncnn $version for $target, once; this takes some minutes"
    case "$target" in
        x86_64) options=("${X86_64[@]}") ;;
        aarch64) options=("${AARCH64[@]}") ;;
    esac
    [[ "$version" =~ \.([0-9]{8})$ ]] && options+=("-DNCNN_VERSION=${BASH_REMATCH[1]}")
    rm -rf "$installed.partial"
    # An interrupted build goes on where it stopped.
    configure "$cache/source" "$installed.build" "$target" "${COMMON[@]}" "${options[@]}" \
        "-DCMAKE_INSTALL_PREFIX=$installed.partial"
    compile "$installed.build" --target install
    mv "$installed.partial" "$installed"
    rm -rf "$installed.build"
    flock -u 9
}

# make_headers: ncnn's headers in $cache/include, whole or not at all.
make_headers() {
    local partial=$cache/include.partial
    [[ -d "$cache/include" ]] || lock_cache
    if [[ ! -d "$cache/include" ]]; then
        fetch_source
        rm -rf "$partial" && mkdir "$partial"
        configure "$cache/source" "$partial/build" "$(uname -m)" "${COMMON[@]}"
        cp "$cache"/source/src/*.h "$partial"/build/src/*.h "$partial"
        rm -rf "$partial/build"
        mv "$partial" "$cache/include"
    fi
    echo "build_bundle: $cache/include"
}

# build_program BUNDLE TARGET
build_program() {
    local bundle=$1 target=$2 options=() build
    [[ "$target" == "$(uname -m)" ]] || options=(-DESPALIER_STATIC=ON)
    build=$(mktemp -d "${TMPDIR:-/tmp}/build_bundle.XXXXXX")
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$build'" EXIT
    configure "$bundle/cpp" "$build" "$target" "-Dncnn_DIR=$cache/$target-$RECIPE/lib/cmake/ncnn" "${options[@]}"
    compile "$build"
    mkdir -p "$bundle/bin/$target"
    mv "$build/detect" "$bundle/bin/$target/.detect"  # it may come from another disk
    mv "$bundle/bin/$target/.detect" "$bundle/bin/$target/detect"
    rm -rf "$build"
    echo "build_bundle: $bundle/bin/$target/detect"
}

# configure SOURCE BUILD TARGET OPTION …
configure() {
    local source=$1 build=$2 target=$3 options=("${@:4}")
    command -v ninja >/dev/null && options+=(-G Ninja)
    [[ "$target" == "$(uname -m)" ]] ||
        options+=("-DCMAKE_TOOLCHAIN_FILE=$repository/export/bundle/cpp/$target-linux-gnu.cmake")
    mkdir -p "$build"
    cmake -S "$source" -B "$build" "${options[@]}" >"$build/configure.log" 2>&1 ||
        { tail -n 20 "$build/configure.log" >&2; fail "cmake cannot configure $source for $target"; }
    grep -h "libjpeg not found" "$build/configure.log" || true
}

# compile BUILD ARGUMENT …
compile() {
    nice -n 5 cmake --build "$1" --parallel "${JOBS:-$(nproc)}" "${@:2}" 2>&1 | tee "$1/build.log" | show_progress ||
        { tail -n 20 "$1/build.log" >&2; fail "the compiler failed: the last lines are above"; }
}

# show_progress: of a build's output only how far it is; in a log, which keeps every line, only each tenth of it.
show_progress() {
    local line share last=-1
    while IFS= read -r line; do
        if [[ "$line" =~ ^\[\ *([0-9]+)%\] ]]; then # make
            share=${BASH_REMATCH[1]}
        elif [[ "$line" =~ ^\[([0-9]+)/([0-9]+)\] ]]; then # ninja
            share=$((100 * BASH_REMATCH[1] / BASH_REMATCH[2]))
        else
            continue
        fi
        if [[ -t 2 ]]; then
            printf '\rbuild_bundle: %d %%' "$share" >&2
        elif ((share / 10 > last)); then
            last=$((share / 10))
            echo "build_bundle: $share %" >&2
        fi
    done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
}

# fetch_source: ncnn's source in $cache/source, whole or not at all.
fetch_source() {
    [[ -d "$cache/source" ]] && return
    local python=$repository/.venv/bin/python index
    [[ -x "$python" ]] || python=python3
    # Not `pip download`: the package names the day on which its metadata is made as its version, which pip refuses.
    index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)}
    rm -rf "$cache/source.partial"
    "$python" "$repository/scripts/ncnn_source.py" "${NCNN_SOURCE:-$version}" "$index" "$cache/source.partial" || exit 2
    mv "$cache/source.partial" "$cache/source"
}

main "$@"; exit  # at once: this file may have changed meanwhile
