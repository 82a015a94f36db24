#!/usr/bin/env bash
# Checks and times this project on one accelerator, within minutes and without a network:
#
#   bash benchmarks/accelerator.sh [--minutes=9] [--out=runs/accelerator]
#   bash benchmarks/accelerator.sh --rehearse    every part at a toy size, on a CPU too
#   bash benchmarks/accelerator.sh --lower       the true programs are traced, not run
#
# PYTHON is an interpreter (from 3.11 on) with JAX; by default the first one found.
# Packages that it lacks may be in a folder that PYTHONPATH names.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
exec "$python" "$here/accelerator.py" "$@"
