#!/usr/bin/env bash
# Writes the locks, which are constraints files for pip: requirements.lock for CPUs and
# TPUs, requirements-cuda.lock for NVIDIA GPUs, requirements-cuda12.lock for those with an
# older driver. Versions change only where they no longer satisfy setup.py; arguments go
# to uv:
#
#   bash launch/lock.sh [--upgrade-package NAME | --upgrade]
#
# It needs the network, reads metadata alone, and takes seconds. uv is that of the
# environment ($VENV, default .venv), else the one on the path.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

uv=$venv/bin/uv
[ -x "$uv" ] || uv=$(command -v uv) ||
  fail "wanted uv in $venv or on the path, got neither; run pip install uv."
cd "$root"

# lock FILE EXTRAS [OPTION...]: one version of each package for all versions of Python.
lock() {
  local file=$1 extra chosen=()
  for extra in $2; do chosen+=(--extra "$extra"); done
  shift 2
  "$uv" pip compile setup.py --quiet --universal --python-version 3.11 \
    --fork-strategy fewest --custom-compile-command "bash launch/lock.sh" \
    --no-annotate "${chosen[@]}" "$@" -o "$file" >/dev/null
  echo "$file: $(grep -c '^[a-z]' "$file") packages"
}

extras="dev docs prepare torch caption medical heic gcs s3 inception tensorboard wandb mlflow"
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

echo 'torch==2.13.0' >"$constraints"  # what continuous integration has for CPUs
lock requirements.lock "$extras tpu aot-tpu" -c "$constraints" "$@"

# What does not depend on CUDA has the same version in all.
grep '^[a-z]' requirements.lock | grep -vE '^((torch|torchvision|triton)=|(cuda|nvidia)-)' \
  >"$constraints"
lock requirements-cuda.lock "$extras cuda aot-gpu" -c "$constraints" "$@"

# PyTorch 2.10 is the last whose wheels on PyPI are for CUDA 12.
echo 'torch<2.11' >>"$constraints"
lock requirements-cuda12.lock "$extras cuda12" -c "$constraints" "$@"
