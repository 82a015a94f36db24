# shellcheck shell=bash
# Sourced by accelerator.sh and run.sh: sets $here, this folder, and $python, a Python
# (from 3.11 on) with JAX: that of PYTHON, or the first one found.

here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)
root=${here%/*}
export PYTHONPATH=$root:$here${PYTHONPATH:+:$PYTHONPATH}

candidates=("${VIRTUAL_ENV:-$root/.venv}/bin/python" "$root/.venv/bin/python"
  python3 python3.{12,11,13,14} python)
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
found=
for python in "${candidates[@]}"; do
  if "$python" -c '
import importlib.util, sys
assert sys.version_info >= (3, 11) and importlib.util.find_spec("jax")
' 2>/dev/null; then
    found=1
    break
  fi
done
if [ -z "$found" ]; then
  echo "${0##*/}: wanted a Python from 3.11 on with JAX, got none of" \
    "${candidates[*]}; set PYTHON to its path." >&2
  exit 2
fi
