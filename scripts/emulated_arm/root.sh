# Sourced by emulated_arm.sh: the file system of the emulated machine, whole or not at all.

# Raised when what follows makes another file system than before.
RECIPE=1
PACKAGES=(base-files bash dash coreutils findutils grep sed tar gzip procps python3 libgomp1 libstdc++6)

# recipe: print what the file system depends on.
recipe() {
    echo "$RECIPE $(. /etc/os-release && echo "$VERSION_CODENAME") $(sha256sum <"$repository/requirements.lock")"
}

# is_made: whether $root is what make_root would make now.
is_made() {
    [[ -e "$root/opt/espalier/recipe" && "$(<"$root/opt/espalier/recipe")" == "$(recipe)" ]]
}

# make_root: $root from the packages of this machine's own distribution, and from wheels.
make_root() {
    local codename partial=$root.partial version pins
    ! is_made || return 0
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    say "fetching the packages of $codename for arm64, about 180 MB on disk"
    rm -rf --one-file-system "$partial" "$root"
    sources >"$cache/sources.list"
    # In a namespace of its own: whatever mmdebstrap mounts ends with it, also when it is killed.
    unshare --mount mmdebstrap --mode=root --variant=extract --architectures=arm64 \
        --include="$(IFS=,; echo "${PACKAGES[*]}")" "${apt_options[@]}" \
        "$codename" "$partial" "$cache/sources.list" >"$cache/mmdebstrap.log" 2>&1 ||
        { tail -n 5 "$cache/mmdebstrap.log" >&2; fail "the packages cannot be fetched: the lines above say why"; }
    settle "$partial"
    version=$(basename "$(readlink "$partial/usr/bin/python3")")
    find_python
    mapfile -t pins < <(pinned "${version#python}" ncnn numpy)
    [[ ${#pins[@]} == 2 ]] || fail "requirements.lock pins no ncnn and numpy for $version"
    say "fetching wheels of ${pins[*]} for $version"
    fetch_wheels "$partial/usr/local/lib/$version/dist-packages" "${version#python}" "${pins[@]}"
    mkdir -p "$partial/opt/espalier"
    recipe >"$partial/opt/espalier/recipe"
    mv "$partial" "$root"
}

# sources: print this machine's own apt sources of its distribution as lines for arm64, and set $apt_options.
sources() {
    local distribution found
    distribution=$(. /etc/os-release && echo "${ID^}")
    found=$(apt_sources "$distribution")
    if [[ -z "$found" ]]; then
        apt-get update >"$cache/apt.log" 2>&1 || fail "apt-get update fails: $(tail -n 1 "$cache/apt.log")"
        found=$(apt_sources "$distribution")
    fi
    [[ -n "$found" ]] || fail "apt knows no source of $distribution: see /etc/apt/sources.list.d"
    # Ubuntu keeps its ports apart from its archive.
    [[ "$distribution" != Ubuntu ]] ||
        found=$(sed -E 's#https?://[^ ]+#http://ports.ubuntu.com/ubuntu-ports/#' <<<"$found" | sort -u)
    echo "$found"
}

# apt_sources DISTRIBUTION
apt_sources() {
    # shellcheck disable=SC2016  # apt's own variables
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' "Origin: $1" 'Component: main' | sort -u
}

# What this machine's apt was told about proxies, mirrors of certificates and old snapshots holds for the packages too.
mapfile -t apt_options < <(
    { apt-config dump 2>/dev/null || true; } | sed -nE 's/^(Acquire::(https?::|Check-).*;)$/--aptopt=\1/p'
)

# settle FOLDER: what the packages' own scripts, which do not run, would have done.
settle() {
    local folder=$1
    [[ -e "$folder/bin/sh" ]] || ln -s dash "$folder/bin/sh"
    ln -sf python3 "$folder/usr/bin/python"
    echo "root:x:0:0:root:/root:/bin/bash" >"$folder/etc/passwd"
    echo "root:x:0:" >"$folder/etc/group"
    echo "127.0.0.1 localhost $name" >"$folder/etc/hosts"
    echo "$name" >"$folder/etc/hostname"
    mkdir -p "$folder/data/local/tmp" "$folder/run" # where adb's users put things
}

# find_python: set $python to one that has pip.
find_python() {
    for python in "$repository/.venv/bin/python" python3; do
        ! "$python" -m pip --version >/dev/null 2>&1 || return 0
    done
    fail "no Python with pip: run bash scripts/demo.sh once, or sudo apt install python3-pip"
}

# pinned PYTHON_VERSION NAME …: print NAME==VERSION of requirements.lock for that version of Python.
pinned() {
    "$python" - "$repository/requirements.lock" "$@" <<'PYTHON'
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

lock, version, *names = sys.argv[1:]
machine = {
    "python_version": version,
    "python_full_version": f"{version}.0",
    "sys_platform": "linux",
    "platform_machine": "aarch64",
}
for line in Path(lock).read_text().splitlines():
    if line.split("==")[0] in names:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(machine):
            print(requirement.name + str(requirement.specifier))
PYTHON
}

# fetch_wheels FOLDER PYTHON_VERSION REQUIREMENT …
fetch_wheels() {
    local folder=$1 version=$2 platforms=() minor newest wheel
    newest=$(getconf GNU_LIBC_VERSION | cut -d. -f2) # that of the emulated machine too
    for minor in $(seq 17 "$newest"); do
        platforms+=(--platform "manylinux_2_${minor}_aarch64")
    done
    rm -rf "$cache/wheels"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --platform manylinux2014_aarch64 "${platforms[@]}" \
        --python-version "$version" --implementation cp --dest "$cache/wheels" "${@:3}" >"$cache/pip.log" 2>&1 ||
        { tail -n 3 "$cache/pip.log" >&2; fail "the wheels cannot be fetched: the lines above say why"; }
    mkdir -p "$folder"
    for wheel in "$cache"/wheels/*.whl; do
        "$python" -m zipfile -e "$wheel" "$folder"
    done
    rm -rf "$cache/wheels"
}

# make_counter: put the host's qemu that takes plugins, what it needs, and ours into the root.
make_counter() {
    local espalier=$root/opt/espalier qemu api
    mkdir -p "$espalier/bin"
    rm -f "$espalier/bin/python-count"
    qemu=$(command -v qemu-aarch64)
    if ! "$qemu" --help | grep -q -- -plugin; then
        say "$qemu takes no plugins (Debian 12 builds it with them): instructions cannot be counted here"
        return
    fi
    rm -rf "$espalier/host" && mkdir -p "$espalier/host/lib"
    cp "$qemu" "$espalier/host/qemu-aarch64"
    ldd "$qemu" | sed -nE 's#^.* => (/[^ ]+) .*#\1#p' | xargs -r cp -Lt "$espalier/host/lib"
    cp -L "$(ldd "$qemu" | sed -nE 's#^[[:space:]]*(/[^ ]*ld[-.][^ ]+) .*#\1#p')" "$espalier/host/ld.so"
    # Each qemu takes some versions of its interface, and names them nowhere but in its complaint.
    for api in 1 2 3 4 5 6 7 8; do
        gcc -O2 -Wall -Wextra -shared -fPIC -fvisibility=hidden "-DPLUGIN_API=$api" "$here/instructions.c" \
            -o "$espalier/host/instructions.so"
        if "$qemu" -L "$root" -plugin "$espalier/host/instructions.so" "$root/bin/true" 2>"$cache/plugin.log"; then
            cp "$here/python-count" "$espalier/bin/.python-count"
            chmod 755 "$espalier/bin/.python-count"
            mv "$espalier/bin/.python-count" "$espalier/bin/python-count"
            return
        fi
    done
    say "$qemu takes no plugin of ours, so instructions cannot be counted: $(tail -n 1 "$cache/plugin.log")"
}
