#!/usr/bin/env bash
# All tests, with coverage, on a fresh machine too.
# usage: bash scripts/test.sh [pytest arguments …]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
# Two processes of one thread each: the small models of the tests gain nothing from more threads.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 2 --dist loadfile --cov --cov-report=term "$@"
