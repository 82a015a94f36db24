#!/usr/bin/env bash
# Checks everything: format, lint, tests. Arguments go to pytest:
#
#   bash launch/test.sh [-k NAME | tests/test_FILE.py | ...]
#
# launch/setup_env.sh lists the environment variables it reads.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

prepare_env dev prepare torch

"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
if [ $# = 0 ]; then  # all tests: two files at a time, in the order of tests/conftest.py
  set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$venv/bin/python" -m pytest "$@"
