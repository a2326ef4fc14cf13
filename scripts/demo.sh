#!/usr/bin/env bash
# The main job from nothing: set up, draw the default data set, then train, prune, export and measure.
# usage: bash scripts/demo.sh [key=value …]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
.venv/bin/python -m compress.shapes --output datasets/shapes
exec .venv/bin/python -m compress.run --config configs/pipelines/demo.yaml "$@"
