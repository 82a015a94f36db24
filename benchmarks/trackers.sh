#!/usr/bin/env bash
# What Weights & Biases, MLflow and TensorBoard record of a run, offline, at the versions
# of the lock:
#
#   bash benchmarks/trackers.sh [FOLDER]
#
# Makes an environment in FOLDER (.venv-trackers), 2 GB, and runs
# tests/consumers/trackers.py in it. The tests of every day have stand-ins.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
folder=$(readlink -f "${1:-.venv-trackers}")
if [ ! -d "$folder" ]; then "${PYTHON:-.venv/bin/python}" -m venv "$folder"; fi
"$folder/bin/python" -m pip install -q --disable-pip-version-check -c requirements.lock \
  -e '.[tensorboard,wandb,mlflow]' pytest
# Not in tests/, whose conftest.py wants what the tests are installed with.
exec "$folder/bin/python" -m pytest -q --noconftest -c /dev/null --rootdir=. \
  -p no:cacheprovider tests/consumers/trackers.py
