#!/usr/bin/env bash
# What other programs read of ours, and we of theirs, at the versions of today:
#
#   [TORCH=2.15.0] bash benchmarks/consumers.sh [FOLDER]
#
# Makes two environments in FOLDER (.venv-consumers), runs tests/consumers/elsewhere.py
# with them, and prints the table for docs/exchange.md. CPU only; 3 GB of disk, with a
# PyTorch built for CUDA 8 GB.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
folder=$(readlink -f "${1:-.venv-consumers}")
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"

pip() {  # pip ENVIRONMENT PACKAGE...
  if [ ! -d "$folder/$1" ]; then "$python" -m venv "$folder/$1"; fi
  "$folder/$1/bin/python" -m pip install -q --disable-pip-version-check "${@:2}"
}

# torchvision's wheel wants its own build of PyTorch; its Python code does not.
pip now "torch==${TORCH:-2.13.0}"
pip now --no-deps timm torchvision
pip now pillow numpy pyyaml safetensors datasets pandas duckdb transformers diffusers \
  peft tensorboard
pip before "datasets<3" pillow

export CONSUMERS=$folder CONSUMERS_TABLE=$folder/table.md
{
  echo "$(date -I), Python $("$python" -c 'import platform; print(platform.python_version())'), by \`${TORCH:+TORCH=$TORCH }bash benchmarks/consumers.sh\`:"
  echo
  echo "| program | version | what was read | what was equal |"
  echo "|---|---|---|---|"
} > "$CONSUMERS_TABLE"
status=0
"$python" -m pytest -p no:cacheprovider tests/consumers/elsewhere.py || status=$?
cat "$CONSUMERS_TABLE"
exit $status
