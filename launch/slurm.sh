#!/usr/bin/env bash
# SLURM: installs, and submits a job that runs mvc_jax.train on all of its GPUs:
#
#   bash launch/slurm.sh [FLAG]... -- TRAIN...
#
# Before its time limit the job gets SIGTERM, saves, and is requeued; it resumes by
# itself. TRAIN are flags of mvc_jax.train; this checkout and the workdir are on a disk
# that all nodes share, or the workdir is gs:// or s3://. Flags:
#
#   --nodes=N          machines (1)
#   --gpus=N           of each, every one with a process (8); 0: CPUs, a process a node
#   --time=LIMIT       of SLURM, e.g. 12:00:00 (24:00:00)
#   --signal=SECONDS   before the limit, in which it saves (300)
#   --extras=A,B       EXTRAS: of setup.py (cuda; none for --gpus=0)
#   --log=FILE         %j is the job's number (slurm-%j.log)
#   --sbatch=FLAG      a flag of sbatch's, e.g. --sbatch=--partition=a100; repeatable
#   --dry-run          prints every command and the job's script, and runs none
#
# The last line is the job's number.
set -euo pipefail
here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)
# shellcheck source-path=SCRIPTDIR
source "$here/setup_env.sh"
# shellcheck source-path=SCRIPTDIR
source "$here/steps.sh"

nodes=1 gpus=8 limit=24:00:00 signal=300 log=slurm-%j.log
given=${EXTRAS-} sbatch_flags=() train=()
while [ $# -gt 0 ]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=?*) limit=${1#*=} ;;
    --signal=*) signal=${1#*=} ;;
    --extras=?*) given=${1#*=} ;;
    --log=?*) log=${1#*=} ;;
    --sbatch=?*) sbatch_flags+=("${1#*=}") ;;
    --) shift; train=("$@"); break ;;
    *) common_flag "$1" ;;
  esac
  shift
done
whole --nodes "$nodes"
whole --signal "$signal"
if [ "$gpus" != 0 ]; then whole --gpus "$gpus"; fi
require_train "--config=configs/cifar100.py --workdir=/shared/cifar100" \
  ${train[@]+"${train[@]}"}
need sbatch "Run this on a login node of the cluster."

if [ "$gpus" != 0 ]; then given=${given:-cuda}; fi
export EXTRAS=$given
step prepare_env

flags=(
  --job-name=mvc_jax "--nodes=$nodes" "--time=$limit" "--output=$log"
  --open-mode=append --requeue
  "--signal=TERM@$signal"  # to the processes, not to the script
  "--chdir=$root" "--ntasks-per-node=$((gpus ? gpus : 1))"
)
# Each process sees all GPUs of its node, and JAX takes the one of its number.
if [ "$gpus" != 0 ]; then flags+=("--gpus-per-node=$gpus"); fi
flags+=(${sbatch_flags[@]+"${sbatch_flags[@]}"} --parsable)

# The others may save for as long as SLURM waits when one has ended.
script="#!/usr/bin/env bash
trap : TERM  # at a preemption; srun passes it on
code=0
srun --kill-on-bad-exit=0 --wait=$signal $(quoted "$venv/bin/python" -m mvc_jax.train "${train[@]}") || code=\$?
echo \"launch: the run ended with code \$code\"
if [ \"\$code\" = 75 ]; then exec scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \"\$code\""

if [ -n "$dry_run" ]; then
  quoted sbatch "${flags[@]}"
  echo "$script"
else
  number=$(sbatch "${flags[@]}" <<<"$script") ||
    refuse "sbatch" "the job to be accepted" "its error above" \
      "Correct --time, --gpus, --nodes or --sbatch=--partition=..., --sbatch=--account=..."
  say "submitted; it is followed with tail -f ${log//%j/${number%%;*}}, stopped with" \
    "scancel --signal=TERM ${number%%;*} (which requeues it) or scancel ${number%%;*}"
  echo "${number%%;*}"
fi
