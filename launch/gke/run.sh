#!/usr/bin/env bash
# Kubernetes, GKE's in particular: a JobSet that runs mvc_jax.train, by kubectl.
#
#   bash launch/gke/run.sh apply  --type=TYPE --image=IMAGE [FLAG]... -- TRAIN...
#   bash launch/gke/run.sh logs   [--name=NAME]
#   bash launch/gke/run.sh status [--name=NAME]
#   bash launch/gke/run.sh delete [--name=NAME]
#
# The cluster has JobSet (https://jobset.sigs.k8s.io) and nodes of the type; the image is
# made by launch/Dockerfile. A pod that is stopped (exit code 75) or lost restarts all,
# and the run resumes; exit code 2, an error with its sentence, ends it. TRAIN are flags
# of mvc_jax.train, with --workdir=gs://BUCKET/FOLDER. Flags:
#
#   --name=NAME       of the JobSet (mvc-jax)
#   --type=TYPE       TPU slices: v5e-4, v5e-8, v5e-16, ..., v5p-8, v6e-8, ...
#                     GPUs: h100, h200, a100, l4
#   --nodes=N         machines with GPUs (1)
#   --gpus=N          of each (8)
#   --spot            on spot nodes
#   --image=IMAGE     e.g. us-docker.pkg.dev/PROJECT/REPOSITORY/mvc_jax
#   --restarts=N      at most (100)
#   --grace=SECONDS   in which it saves (120; spot nodes may give less)
#   --account=NAME    the pods' Kubernetes service account, which may use the bucket
#   --namespace=NAME, --context=NAME   of kubectl
#   --dry-run         prints every command and the JobSet, and runs none
set -euo pipefail
here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)
# shellcheck source-path=SCRIPTDIR
source "$here/../steps.sh"

name=mvc-jax type='' nodes=1 gpus=8 spot='' image='' restarts=100 grace=120 account=''
kubectl=(kubectl) train=()
action=${1:-}
case $action in
  apply | logs | status | delete) shift ;;
  '' | -h | --help) help ;;
  *)
    refuse "gke/run.sh" "apply, logs, status or delete" "'$action'" \
      "Name one first; --help explains them."
    ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --spot) spot=1 ;;
    --image=?*) image=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --account=?*) account=${1#*=} ;;
    --namespace=?* | --context=?*) kubectl+=("$1") ;;
    --) shift; train=("$@"); break ;;
    *) common_flag "$1" ;;
  esac
  shift
done
cloud_name --name "$name"
whole --nodes "$nodes"
whole --gpus "$gpus"
whole --restarts "$restarts"
whole --grace "$grace"
need kubectl "Install it, and get the cluster's credentials: gcloud container clusters get-credentials"

# slice TYPE: GKE's accelerator and topology, machines, and chips of each.
slice() {
  local chips=${type#*-}
  whole --type "$chips"
  per_machine=4
  case $type in
    v5e-*) accelerator=tpu-v5-lite-podslice ;;
    v6e-*) accelerator=tpu-v6e-slice ;;
    v5p-*) accelerator=tpu-v5p-slice; chips=$((chips / 2)) ;;  # named by its cores
  esac
  case $type in
    v5p-8) topology=2x2x1 ;;
    v5p-16) topology=2x2x2 ;;
    v5p-32) topology=2x2x4 ;;
    v5p-64) topology=2x4x4 ;;
    v5p-128) topology=4x4x4 ;;
    v[56]e-1) topology=1x1 per_machine=1 ;;
    v[56]e-4) topology=2x2 ;;
    v[56]e-8) topology=2x4 per_machine=8 ;;
    v[56]e-16) topology=4x4 ;;
    v[56]e-32) topology=4x8 ;;
    v[56]e-64) topology=8x8 ;;
    v[56]e-128) topology=8x16 ;;
    v[56]e-256) topology=16x16 ;;
    *)
      refuse "--type" "a slice that GKE has, e.g. v5e-16 or v5p-8" "$type" "Choose another."
      ;;
  esac
  nodes=$((chips / per_machine))
}

# Prints words as a YAML (and JSON) list.
list() {
  local word text=
  for word in "$@"; do
    word=${word//\\/\\\\}
    text+="${text:+, }\"${word//\"/\\\"}\""
  done
  printf '[%s]\n' "$text"
}

# Prints the JobSet. Kubernetes reads $(NAME) in arguments as a variable; $$ is a dollar.
jobset() {
  local text line words=("${train[@]//\$/\$\$}")
  if [ "$kind" = gpu ] && [ "$nodes" -gt 1 ]; then
    words+=("--coordinator=$name-workers-0-0.$name:8476" "--num_processes=$nodes"
      "--process_id=\$(PROCESS)")
  fi
  while IFS= read -r line; do
    line=${line//'{{NAME}}'/$name}
    line=${line//'{{RESTARTS}}'/$restarts}
    line=${line//'{{NODES}}'/$nodes}
    line=${line//'{{GRACE}}'/$grace}
    line=${line//'{{ACCELERATOR}}'/$accelerator}
    line=${line//'{{TOPOLOGY}}'/$topology}
    line=${line//'{{IMAGE}}'/$image}
    line=${line//'{{CHIPS}}'/$per_machine}
    case $line in
      *'{{SERVICE_ACCOUNT}}'*)
        if [ -z "$account" ]; then continue; fi
        line=${line//'{{SERVICE_ACCOUNT}}'/serviceAccountName: $account}
        ;;
      *'{{SPOT}}'*)
        if [ -z "$spot" ]; then continue; fi
        line=${line//'{{SPOT}}'/cloud.google.com/gke-spot: '"true"'}
        ;;
      *'{{TRAIN}}'*) text=$(list "${words[@]}"); line="${line%%'{{'*}$text" ;;
    esac
    printf '%s\n' "$line"
  done <"$here/$kind.yaml"
}

apply() {
  topology=
  case $type in
    v*) kind=tpu; slice ;;
    h100) kind=gpu accelerator=nvidia-h100-80gb per_machine=$gpus ;;
    h200) kind=gpu accelerator=nvidia-h200-141gb per_machine=$gpus ;;
    a100) kind=gpu accelerator=nvidia-a100-80gb per_machine=$gpus ;;
    l4) kind=gpu accelerator=nvidia-l4 per_machine=$gpus ;;
    *)
      refuse "--type" "a TPU slice (v5e-16, v5p-8, ...) or h100, h200, a100, l4" \
        "'$type'" "Name one."
      ;;
  esac
  [ -n "$image" ] || refuse "--image" "an image made by launch/Dockerfile" "none" \
    "Make one (docs/many-hosts.md) and name it."
  [ ${#train[@]} -gt 0 ] || refuse "apply" "flags of mvc_jax.train behind --" "none" \
    "For example: -- --config=configs/cifar100.py --workdir=gs://BUCKET/cifar100"
  local code=0 words
  if [ -n "$dry_run" ]; then
    quoted "${kubectl[@]}" apply -f -
    jobset
    return
  fi
  words=$(jobset | "${kubectl[@]}" apply -f - 2>&1) || code=$?
  echo "$words"
  if [ "$code" = 0 ]; then
    say "it costs money until it ends, or: $(quoted bash launch/gke/run.sh delete \
      "--name=$name"); nodes that the cluster keeps cost money after that, too."
    return
  fi
  case $words in
    *'no matches for kind'*)
      refuse "cluster" "JobSet" "none" "Install it: https://jobset.sigs.k8s.io/docs/installation"
      ;;
    *[Qq]uota*)
      refuse "quota" "room for $nodes pods of $type" "the error above" \
        "Have the namespace's quota raised, or ask for less."
      ;;
    *immutable*)
      refuse "$name" "a name that is free, or the same job" "another with this name" \
        "Delete it, or choose another --name."
      ;;
  esac
  refuse "kubectl" "it to accept the JobSet" "the error above" "Correct this and rerun."
}

pods=(-l "jobset.sigs.k8s.io/jobset-name=$name")
case $action in
  apply) apply ;;
  logs)
    step "${kubectl[@]}" logs "${pods[@]}" -c train --prefix --follow --max-log-requests=64
    ;;
  status)
    step "${kubectl[@]}" get jobset "$name"
    step "${kubectl[@]}" get pods "${pods[@]}" -o wide
    ;;
  delete)
    step "${kubectl[@]}" delete jobset "$name"
    say "nodes that the cluster keeps, and what is in the bucket, cost money still."
    ;;
esac
