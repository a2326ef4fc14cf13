# Sourced by emulated_arm.sh: what this machine must be and have.

say() {
    echo "emulated_arm: $1"
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# quoted TEXT: as JSON; null when empty.
quoted() {
    local text=${1//\\/\\\\}
    [[ -n "$1" ]] || { echo null; return; }
    echo "\"${text//\"/\\\"}\""
}

# lock: keep a second up or down out until this one ends.
lock() {
    exec 9>"$cache/lock"
    flock -n 9 || { say "waiting for another one"; flock 9; }
}

# check_machine [OS_RELEASE]
check_machine() {
    local id="" release=${1:-/etc/os-release}
    # Read in a subshell: the file sets many variables.
    [[ ! -r "$release" ]] || id=$(. "$release" && echo "${ID:-}")
    [[ "$id" == debian || "$id" == ubuntu ]] ||
        fail "an emulated ARM machine is made of Debian's or Ubuntu's packages, and this is ${id:-another system}: use a container of one"
    [[ "$(uname -m)" != aarch64 ]] ||
        fail "not needed: this machine is an ARM itself, so measure on it (and count with perf stat -e instructions)"
    [[ "$(id -u)" == 0 ]] || fail "needs root: sudo bash scripts/emulated_arm.sh up"
}

# install_tools: with apt, only what is missing.
install_tools() {
    local command missing=()
    local -A packages=(
        [qemu-aarch64-static]=qemu-user-static [qemu-aarch64]=qemu-user [mmdebstrap]=mmdebstrap
        [sshd]=openssh-server [ssh]=openssh-client [gcc]=gcc
    )
    for command in "${!packages[@]}"; do
        PATH=$PATH:/usr/sbin command -v "$command" >/dev/null || missing+=("${packages[$command]}")
    done
    [[ -e /usr/include/stdio.h ]] || missing+=(libc6-dev)
    [[ ${#missing[@]} -gt 0 ]] || return 0
    say "installing ${missing[*]}"
    install_packages "${missing[@]}" >"$cache/apt.log" 2>&1 ||
        { tail -n 5 "$cache/apt.log" >&2; fail "apt cannot install ${missing[*]}: the lines above say why"; }
}

# install_packages NAME …: the package of an ssh server must not open this machine to others by the way.
install_packages() (
    export DEBIAN_FRONTEND=noninteractive
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e "$policy" ]]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
    fi
    apt-get install -y --no-install-recommends "$@" || { apt-get update && apt-get install -y --no-install-recommends "$@"; }
    if [[ " $* " == *" openssh-server "* ]]; then
        systemctl disable ssh.service ssh.socket || true
    fi
)
