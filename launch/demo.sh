#!/usr/bin/env bash
# Runs all stages on the digits that come with scikit-learn:
#
#   bash launch/demo.sh [--config=FILE] [--config.a.b=VALUE]... [--workdir=FOLDER]
#
# These flags override the demo's own; relative paths in them start at the repository
# root. launch/setup_env.sh lists the environment variables it reads.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

prepare_env ""

# Another config replaces the demo's: overrides apply to every --config, and the demo's
# may not have the fields of the other.
config=--config=configs/digits.py
for flag in "$@"; do
  case $flag in -config | -config=* | --config | --config=*) config= ;; esac
done
exec "$venv/bin/python" -m mvc_jax.train $config --workdir=runs/digits "$@"
