#!/usr/bin/env bash
# An emulated 64-bit ARM machine behind ssh on loopback, to try the whole way to a device without having one.
# usage: bash scripts/emulated_arm.sh up [--port N]    set it up and start it; what is there already is kept
#        bash scripts/emulated_arm.sh status [--json]  say whether it runs, and how to reach it; exit code 1 if it is down
#        bash scripts/emulated_arm.sh down [--purge]   end it and everything that runs on it; --purge: delete it too
#
# Needs root on Debian or Ubuntu and a CPU that is not ARM. What is missing is installed with apt. On it are python3,
# numpy and ncnn; `ssh -F CONFIG espalier-arm` reaches it, and /opt/espalier/bin/python-count is a Python that counts
# instructions (see emulated_arm/instructions.c). Emulation gives exact results and counts, but no times.
# ESPALIER_CACHE: where all of it is kept, in a folder of its own (default: ~/.cache/espalier).
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$repository/scripts/emulated_arm
cache=$(realpath -m "${ESPALIER_CACHE:-$HOME/.cache/espalier}/emulated-arm")
root=$cache/root
name=espalier-arm

source "$here/tools.sh"
source "$here/root.sh"
source "$here/server.sh"

main() {
    local command=${1:-} port="" json="" purge=""
    case "$command" in
        up | status | down) shift ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; return ;;
        *) fail "say what to do: bash scripts/emulated_arm.sh up|status|down" ;;
    esac
    while [[ $# -gt 0 ]]; do
        case "$command $1" in
            "up --port")
                port=${2:-}
                [[ "$port" =~ ^[1-9][0-9]{3,4}$ ]] && ((port >= 1024 && port < 65536)) ||
                    fail "--port wants a number from 1024 to 65535"
                shift
                ;;
            "status --json") json=1 ;;
            "down --purge") purge=1 ;;
            *) fail "$command does not know '$1': bash scripts/emulated_arm.sh --help" ;;
        esac
        shift
    done
    case "$command" in
        up) up "$port" ;;
        status) status "$json" ;;
        down) down "$purge" ;;
    esac
}

# up PORT: PORT may be empty.
up() {
    check_machine
    mkdir -p "$cache"
    lock
    if is_running && is_made && answers; then
        [[ -z "$1" || "$1" == "$(<"$cache/port")" ]] ||
            fail "it is up on port $(<"$cache/port"): first run bash scripts/emulated_arm.sh down"
        say "is up already"
    else
        stop
        install_tools
        make_root
        make_counter
        enable_emulation
        start "$1"
    fi
    status ""
}

# status JSON: JSON may be empty.
status() {
    local state=down pid="" port="" config="" counter=false
    if is_running; then
        state=up pid=$(<"$cache/pid") port=$(<"$cache/port") config=$cache/ssh_config
        [[ ! -e "$root/opt/espalier/bin/python-count" ]] || counter=true
    fi
    if [[ -n "$1" ]]; then
        printf '{"state": "%s", "pid": %s, "port": %s, "host": "%s", "ssh_config": %s, "counts_instructions": %s}\n' \
            "$state" "${pid:-null}" "${port:-null}" "$name" "$(quoted "$config")" "$counter"
    elif [[ "$state" == up ]]; then
        say "up: pid $pid, port $port, counts instructions: $counter"
        say "ssh -F $(printf %q "$config") $name uname -m"
    else
        say "down"
    fi
    [[ "$state" == up ]]
}

# down PURGE: PURGE may be empty.
down() {
    [[ -d "$cache" ]] || { say "down"; return; }
    [[ "$(id -u)" == 0 ]] || fail "needs root: sudo bash scripts/emulated_arm.sh down"
    lock
    stop
    disable_emulation
    [[ -z "$1" ]] || rm -rf --one-file-system "$cache"
    say "down"
}

main "$@"; exit  # at once: this file may have changed meanwhile
