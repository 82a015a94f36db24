#!/usr/bin/env bash
# Checks everything: format, lint, tests. Arguments go to pytest:
#
#   bash launch/test.sh [-k NAME | tests/test_FILE.py | ...]
#
# launch/setup_env.sh lists the environment variables it reads.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

# Python compiles what the tests import; pip would compile 27,000 files, one by one.
export PIP_COMPILE=0

prepare_env dev prepare torch

# aside NAME PACKAGE...: installs packages alone into the folder NAME of the environment,
# for tests that need them where nothing else may find them.
aside() {
  local folder=$venv/$1
  if [ -d "$folder" ]; then return; fi
  rm -rf "$folder.new"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps \
    -c requirements.lock --target "$folder.new" "${@:2}"
  mv "$folder.new" "$folder"
}

# libtpu compiles for TPUs that are absent (tests/test_compiled.py). Beside JAX it would
# be asked for a TPU by every process.
if [ -z "${MVC_JAX_WITHOUT_LIBTPU:-}" ]; then
  aside libtpu "$("$venv/bin/python" -c '
import importlib.metadata, re
requirements = importlib.metadata.requires("jax")
print(next(re.split("[ ;]", x)[0] for x in requirements if x.startswith("libtpu")))')"
fi
# torchvision's wheels are for the PyTorch of PyPI; transformers would import them.
aside torch-fidelity torch-fidelity torchvision

"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
if [ $# = 0 ]; then  # all tests: two files at a time, in the order of tests/conftest.py
  set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$venv/bin/python" -m pytest "$@"
