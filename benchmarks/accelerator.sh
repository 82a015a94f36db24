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
here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)
root=${here%/*}
export PYTHONPATH=$root:$here${PYTHONPATH:+:$PYTHONPATH}

candidates=("${VIRTUAL_ENV:-$root/.venv}/bin/python" "$root/.venv/bin/python"
  python3 python3.{12,11,13,14} python)
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
for python in "${candidates[@]}"; do
  if "$python" -c '
import importlib.util, sys
assert sys.version_info >= (3, 11) and importlib.util.find_spec("jax")
' 2>/dev/null; then
    exec "$python" "$here/accelerator.py" "$@"
  fi
done
echo "accelerator.sh: wanted a Python from 3.11 on with JAX, got none of" \
  "${candidates[*]}; set PYTHON to its path." >&2
exit 2
