#!/usr/bin/env bash
# Runs the whole program on the digits that come with scikit-learn:
#
#   bash launch/demo.sh [--config=FILE] [--config.a.b=VALUE]... [--workdir=FOLDER]
#
# Flags given here win over the demo's own; relative paths in them start at the
# repository root. launch/setup_env.sh lists the environment variables that count.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

prepare_env

# Another config replaces the demo's: each --config is read with all the overrides, and
# the demo's would not know the other's fields.
config=--config=configs/digits.py
for flag in "$@"; do
  case $flag in -config | -config=* | --config | --config=*) config= ;; esac
done
exec "$venv/bin/python" -m mvc_jax.train $config --workdir=runs/digits "$@"
