#!/usr/bin/env bash
# One machine with one or several NVIDIA GPUs: installs, and runs mvc_jax.train:
#
#   bash launch/gpu.sh [FLAG]... -- TRAIN...
#
# One process uses all GPUs. On several machines without a scheduler, run this on each,
# with --coordinator, --num_processes and --process_id among TRAIN. Flags:
#
#   --gpus=0,1,...   CUDA_VISIBLE_DEVICES: which (all)
#   --processes=N    share the GPUs evenly, as on several machines (1)
#   --port=PORT      of the first of several processes (8476)
#   --extras=A,B     EXTRAS: of setup.py (cuda; cuda12 for drivers older than 580)
#   --dry-run        prints every command, and runs none
#
# SIGTERM and Ctrl-C reach all processes. The exit code is the program's: 0 done; 2 an
# error with its sentence; 75 stopped, rerun to resume.
set -euo pipefail
here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)
# shellcheck source-path=SCRIPTDIR
source "$here/setup_env.sh"
# shellcheck source-path=SCRIPTDIR
source "$here/steps.sh"

gpus=${CUDA_VISIBLE_DEVICES-} processes=1 port=8476 train=()
EXTRAS=${EXTRAS:-cuda}
while [ $# -gt 0 ]; do
  case $1 in
    --gpus=?*) gpus=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --extras=?*) EXTRAS=${1#*=} ;;
    --) shift; train=("$@"); break ;;
    *) common_flag "$1" ;;
  esac
  shift
done
export EXTRAS
whole --processes "$processes"
whole --port "$port"
require_train "--config=configs/cifar100.py --workdir=runs/cifar100" \
  ${train[@]+"${train[@]}"}
need nvidia-smi "Install NVIDIA's driver, or run launch/demo.sh on CPUs."

numbers() {  # of the GPUs to use, one a line
  if [ -n "$gpus" ]; then
    tr , '\n' <<<"$gpus"
  elif [ -z "$dry_run" ]; then
    nvidia-smi --query-gpu=index --format=csv,noheader ||
      refuse "nvidia-smi" "NVIDIA GPUs with a driver" "its error above" \
        "Repair the driver, or run launch/demo.sh on CPUs."
  fi
}

list=$(numbers)
read -r -d '' -a found <<<"$list" || true
if [ ${#found[@]} = 0 ] && [ -z "$dry_run" ]; then
  refuse "nvidia-smi" "a GPU" "none" "Run launch/demo.sh on CPUs."
fi
if [ ${#found[@]} -gt 0 ] && [ $((${#found[@]} % processes)) != 0 ]; then
  refuse "--processes" "a divisor of ${#found[@]} GPUs" "$processes" "Correct it."
fi

step prepare_env
program=("$venv/bin/python" -m mvc_jax.train)
shown=()  # CUDA_VISIBLE_DEVICES, if it is to be set
show() { shown=(env "CUDA_VISIBLE_DEVICES=$1"); }

if [ "$processes" = 1 ]; then
  if [ -n "$gpus" ]; then show "$gpus"; fi
  step exec ${shown[@]+"${shown[@]}"} "${program[@]}" "${train[@]}"
  exit
fi

children=()
set -m  # otherwise they would ignore Ctrl-C
for ((process = 0; process < processes; process++)); do
  share=$((${#found[@]} / processes))
  if [ "$share" -gt 0 ]; then
    show "$(IFS=,; echo "${found[*]:process * share:share}")"
  fi
  command=(${shown[@]+"${shown[@]}"} "${program[@]}" "${train[@]}"
    "--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$process")
  if [ -n "$dry_run" ]; then quoted "${command[@]}" '&'; continue; fi
  "${command[@]}" &
  children+=("$!")
done

trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM
trap 'kill -INT "${children[@]}" 2>/dev/null || true' INT

# An error outweighs a stop, and a stop success.
result=0
for child in ${children[@]+"${children[@]}"}; do
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ended `wait`, not the child
    code=0
    wait "$child" || code=$?
  done
  case $code in
    0) ;;
    75) if [ "$result" = 0 ]; then result=75; fi ;;
    *) if [ "$result" = 0 ] || [ "$result" = 75 ]; then result=$code; fi ;;
  esac
done
exit "$result"
