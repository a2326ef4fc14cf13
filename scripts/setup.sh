# Make .venv what requirements.lock says: installs only when the lock has changed since the last time.
# usage: bash scripts/setup.sh
# demo.sh, test.sh and .ci/run source it and call `setup`, which goes to the repository's root.

setup() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        make_venv "${PYTHON:-python3}"
    fi
    local full without_torch installed=""
    full=$(<requirements.lock)
    without_torch=$(drop_torch <requirements.lock)
    if [[ -f .venv/installed.lock ]]; then
        installed=$(<.venv/installed.lock)
    fi
    if [[ "$installed" != "$full" && "$installed" != "$without_torch" ]]; then
        if cpu_torch_folders .venv/bin/python >/dev/null; then
            install_lock "$without_torch"
        else
            install_lock "$full"
        fi
    fi
}

# make_venv PYTHON: .venv from that Python, which sees the CPU-only torch that this Python may have.
make_venv() {
    local folders site
    check_python "$1"
    echo "setup: making .venv with $("$1" --version)"
    folders=$(cpu_torch_folders "$1") || true
    "$1" -m venv .venv
    if [[ -n "$folders" ]]; then
        # A path file, not --system-site-packages: that would not see the packages of a Python that is itself a venv's.
        site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$folders" >"$site/cpu_torch.pth"
        echo "setup: keeping the CPU-only torch of $1"
    fi
}

# check_python PYTHON: end with one line when it cannot make a virtual environment.
check_python() {
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $1 is missing or older than Python 3.10: name a newer one, such as PYTHON=python3.12" >&2
        exit 2
    fi
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: $1 cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)" >&2
        exit 2
    fi
}

# cpu_torch_folders PYTHON: print the folders that hold its torch and torchvision if both work together, are CPU-only and
# new enough for pyproject.toml; fail if not.
cpu_torch_folders() {
    [[ "$(<pyproject.toml)" =~ \"torch\>=([0-9]+)\.([0-9]+)\" ]] || return 1
    "$1" - "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" 2>/dev/null <<'PYTHON'
import sys
from pathlib import Path

import torch
import torchvision

version = tuple(int(part) for part in torch.__version__.split(".")[:2])
if torch.version.cuda or torch.version.hip or version < (int(sys.argv[1]), int(sys.argv[2])):
    sys.exit(1)
print("\n".join(sorted({str(Path(module.__file__).parents[1]) for module in (torch, torchvision)})))
PYTHON
}

# drop_torch: the lock on stdin without torch and what only its CUDA builds need (nvidia-ml-py is Ultralytics' own).
drop_torch() {
    local line
    while IFS= read -r line; do
        case "$line" in
            nvidia-ml-py==*) echo "$line" ;;
            torch==* | torchvision==* | triton==* | cuda-*==* | nvidia-*==*) ;;
            *) echo "$line" ;;
        esac
    done
}

# install_lock LINES: install exactly these, then the project itself, and remember the lines when all of it is there.
install_lock() {
    echo "setup: installing the packages of requirements.lock"
    printf '%s\n' "$1" >.venv/wanted.lock
    # The lock is complete: with --no-deps pip adds nothing to it, such as a second torch.
    .venv/bin/python -m pip --disable-pip-version-check install --no-deps -r .venv/wanted.lock
    .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation -e .
    mv .venv/wanted.lock .venv/installed.lock
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    set -euo pipefail
    setup
    echo "setup: .venv is ready: source .venv/bin/activate"
fi
