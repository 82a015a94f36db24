#!/usr/bin/env bash
# Runs all benchmarks for the hardware that it finds, writes their tables into RESULTS.md
# and a plot, and says what is worse than the last time by more than the noise:
#
#   bash benchmarks/run.sh [--minutes=20] [--only=PART,...] [--dry-run] [--tables]
#
# --help explains the flags and lists the parts. PYTHON is an interpreter with JAX; by
# default the first one found.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
exec "$python" "$here/sheet.py" "$@"
