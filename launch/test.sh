#!/usr/bin/env bash
# Checks everything: format, lint, tests. Arguments go to pytest:
#
#   bash launch/test.sh [-k NAME | tests/test_FILE.py | ...]
#
# launch/setup_env.sh lists the environment variables it reads.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

prepare_env dev prepare torch

# libtpu compiles for TPUs that are absent (tests/test_compiled.py). Beside JAX it would
# be asked for a TPU by every process, so it has a folder of its own.
if [ ! -d "$venv/libtpu" ] && [ -z "${MVC_JAX_WITHOUT_LIBTPU:-}" ]; then
  wanted=$("$venv/bin/python" -c '
import importlib.metadata, re
requirements = importlib.metadata.requires("jax")
print(next(re.split("[ ;]", x)[0] for x in requirements if x.startswith("libtpu")))')
  rm -rf "$venv/libtpu.new"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps \
    -c requirements.lock --target "$venv/libtpu.new" "$wanted"
  mv "$venv/libtpu.new" "$venv/libtpu"
fi

"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
if [ $# = 0 ]; then  # all tests: two files at a time, in the order of tests/conftest.py
  set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$venv/bin/python" -m pytest "$@"
