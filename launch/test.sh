#!/usr/bin/env bash
# Checks everything: format, lint, tests. Arguments go to pytest:
#
#   bash launch/test.sh [-k NAME | tests/test_FILE.py | ...]
#
# launch/setup_env.sh lists the environment variables that count.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

prepare_env dev prepare torch

"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m ruff check .
if [ $# = 0 ]; then set -- -n 2 --dist loadfile; fi  # all tests: two files at a time
exec "$venv/bin/python" -m pytest "$@"
