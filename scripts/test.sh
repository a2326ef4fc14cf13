#!/usr/bin/env bash
# All tests, with coverage, on a fresh machine too.
# usage: bash scripts/test.sh [pytest arguments …]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec .venv/bin/python -m pytest --cov --cov-report=term "$@"
