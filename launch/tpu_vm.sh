#!/usr/bin/env bash
# Cloud TPU VMs, by gcloud: from a request to a finished run.
#
#   bash launch/tpu_vm.sh create  [FLAG]...             requests a machine and waits for it
#   bash launch/tpu_vm.sh setup   [FLAG]...             copies this checkout, and installs
#   bash launch/tpu_vm.sh run     [FLAG]... -- TRAIN... runs mvc_jax.train on all workers
#   bash launch/tpu_vm.sh logs    [FLAG]...             follows what runs
#   bash launch/tpu_vm.sh stop    [FLAG]...             has it save and end, with code 75
#   bash launch/tpu_vm.sh babysit [FLAG]... -- TRAIN... all of these; again after preemption
#   bash launch/tpu_vm.sh delete  [FLAG]...             removes the machine and the request
#
# TRAIN are flags of mvc_jax.train; the workdir is gs://BUCKET/FOLDER, or a folder that
# all workers share. Flags, with the environment variable that each stands for:
#
#   --name=NAME       TPU_NAME: of machine and request (mvc-jax)
#   --type=TYPE       TPU_TYPE: v5e-8, v5p-8, v6e-8, v4-8, ... (v5e-8)
#   --zone=ZONE       CLOUDSDK_COMPUTE_ZONE, or gcloud's default
#   --project=ID      CLOUDSDK_CORE_PROJECT, or gcloud's default
#   --spot            TPU_SPOT=1: much cheaper, and may be taken away at any time
#   --runtime=IMAGE   TPU_RUNTIME: the machine's software (that of the type)
#   --extras=A,B      EXTRAS: of setup.py, beside tpu and gcs
#   --create=FLAG     a flag of gcloud's for `create`, e.g. --create=--network=lab; repeatable
#   --worker=N        of `logs` (0)
#   --delete          `babysit` removes the machine at the end
#   --poll=SECONDS    between questions to the cloud (30)
#   --dry-run         prints every command, and runs none
#
# `run` and `babysit` exit with the program's code: 0 done; 2 an error with its sentence;
# 75 stopped, rerun to resume. The run goes on if this script or its connection ends.
set -euo pipefail
here=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)
root=${here%/*}
# shellcheck source-path=SCRIPTDIR
source "$here/steps.sh"

name=${TPU_NAME:-mvc-jax} type=${TPU_TYPE:-v5e-8} runtime=${TPU_RUNTIME:-}
zone='' project='' spot=${TPU_SPOT:-} extras=${EXTRAS:-} worker=0 poll=30
delete_at_end='' create_flags=() train=()
again=75 cut=255  # exit codes: of a run that was stopped, and of a lost connection
patience=5        # failed questions, or connections lost, in a row
failures=3        # failed requests in a row

parse() {
  action=${1:-}
  case $action in
    create | setup | run | logs | stop | babysit | delete) shift ;;
    '' | -h | --help) help ;;
    *)
      refuse "tpu_vm.sh" "create, setup, run, logs, stop, babysit or delete" \
        "'$action'" "Name one first; --help explains them."
      ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      --name=?*) name=${1#*=} ;;
      --type=?*) type=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --spot) spot=1 ;;
      --runtime=?*) runtime=${1#*=} ;;
      --extras=?*) extras=${1#*=} ;;
      --create=?*) create_flags+=("${1#*=}") ;;
      --worker=?*) worker=${1#*=} ;;
      --delete) delete_at_end=1 ;;
      --poll=?*) poll=${1#*=} ;;
      --) shift; train=("$@"); break ;;
      *) common_flag "$1" ;;
    esac
    shift
  done
  cloud_name --name "$name"
  choose_type
  need gcloud "Install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
  place=(--quiet)
  find_default zone "$zone" compute/zone "a zone with $type, e.g. --zone=us-central1-a"
  find_default project "$project" core/project "a project, e.g. --project=my-project"
}

# Google's name of the type, and its image.
choose_type() {
  local image
  case $type in
    v5e-* | v5litepod-*) type=v5litepod-${type#*-} image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    v[234]-*) image=tpu-ubuntu2204-base ;;
    *)
      [ -n "$runtime" ] || refuse "--type" "v2, v3, v4, v5e, v5p or v6e and the size" \
        "$type" "Correct it, or name its image as well: --runtime=IMAGE"
      ;;
  esac
  runtime=${runtime:-$image}
}

# find_default VARIABLE VALUE PROPERTY WANTED: a flag, else what gcloud has by default.
find_default() {
  local value=$2
  if [ -z "$value" ] && [ -z "$dry_run" ]; then
    value=$(gcloud config get-value "$3" 2>/dev/null) || value=
    [ -n "$value" ] || refuse "--$1" "$4" "neither a flag nor a default of gcloud" \
      "Give one, or run gcloud config set $3 VALUE"
  fi
  printf -v "$1" %s "$value"
  if [ -n "$value" ]; then place+=("--$1=$value"); fi
}

# cloud ARGUMENT...: gcloud compute tpus; an error of it becomes a sentence.
cloud() {
  local code=0 words
  step gcloud compute tpus "$@" "${place[@]}" 2>"$said" || code=$?
  if [ "$code" = 0 ]; then return; fi
  words=$(grep -v '^ *$' "$said" | head -n 3 | tr -s ' \n' ' ')
  words=${words% }
  words=${words%.}
  case $words in
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      refuse "quota" "room for $type in ${zone:-the zone}${spot:+, spot}" "$words" \
        "Ask for more TPU chips at https://console.cloud.google.com/iam-admin/quotas, or choose another --zone or --type."
      ;;
    *PERMISSION_DENIED* | *permission*)
      refuse "$project" "an account that may use Cloud TPU" "$words" \
        "Enable it (gcloud services enable tpu.googleapis.com) and ask for the role roles/tpu.admin."
      ;;
    *'auth login'* | *credential* | *UNAUTHENTICATED* | *'active account'*)
      refuse "gcloud" "credentials" "$words" "Run gcloud auth login"
      ;;
    *ALREADY_EXISTS* | *'already exists'*)
      refuse "$name" "a name that is free" "$words" \
        "Use it (setup, run, babysit), delete it, or choose another --name."
      ;;
  esac
  refuse "gcloud" "it to $1 ${*:2:1}" "exit code $code: $words" "Correct this and rerun."
}

# Prints the state of the request: ABSENT, ACTIVE, SUSPENDED, FAILED, ... or UNKNOWN if
# the cloud did not answer. A request of which the machine was taken away is SUSPENDED.
state() {
  local found
  found=$(question queued-resources 'value(state.state)')
  if [ "$found" = ACTIVE ]; then
    case $(question tpu-vm 'value(state)') in
      PREEMPTED | TERMINATED | STOPPED | ABSENT) found=SUSPENDED ;;
    esac
  fi
  echo "$found"
}

question() {
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$name" "--format=$2" "${place[@]}" \
    2>"$said"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found|does not exist' "$said"; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

# What costs money until it is deleted, whenever this script ends.
mention() {
  local code=$?
  rm -f "$said" "${archive:-}"
  if [ -n "$exists" ] && [ -z "$dry_run" ]; then
    local there="is requested or at work, and costs money until"
    if [ "$exists" = perhaps ]; then there="may exist, and then costs money until"; fi
    say "$name ($type${spot:+, spot}) in $zone of $project $there:" \
      "$(quoted bash launch/tpu_vm.sh delete "--name=$name" \
        "--zone=$zone" "--project=$project")"
  fi
  exit "$code"
}

create() {
  exists=1
  if ! (cloud queued-resources create "$name" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}); then
    case $(state) in
      ABSENT) exists= ;;
      UNKNOWN) exists=perhaps ;;
    esac
    exit 2
  fi
  if [ -n "$dry_run" ]; then
    step gcloud compute tpus queued-resources describe "$name" \
      "--format=value(state.state)" "${place[@]}"
  fi
}

# Waits until the machine is there; false if the request failed.
arrive() {
  local before='' now unknown=0
  if [ -n "$dry_run" ]; then return; fi
  while true; do
    now=$(state)
    if [ "$now" != "$before" ]; then say "$name: $now"; before=$now; fi
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | ABSENT) return 1 ;;
      UNKNOWN) unknown=$((unknown + 1)); ask_again "$unknown" ;;
      *) unknown=0 ;;
    esac
    sleep "$poll"
  done
}

ask_again() {
  [ "$1" -lt "$patience" ] || refuse "gcloud" "the state of $name" \
    "$(tail -n 1 "$said")" "Check the network and gcloud auth login, then rerun."
}

# The reason of a failed request.
reason() {
  gcloud compute tpus queued-resources describe "$name" \
    '--format=value(state.failedData.error.message)' "${place[@]}" 2>/dev/null || true
}

on_workers() {  # on_workers WORKER COMMAND
  step gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" "${place[@]}"
}

# setup: this checkout as it is, without tests and what git ignores; the lock's versions.
setup() {
  local helper='mvc_jax/launch/worker.sh' words=(tpu gcs) code=0
  IFS=', ' read -r -a more <<<"$extras"
  words+=(${more[@]+"${more[@]}"})
  archive=$(mktemp)
  if [ -e "$root/.git" ]; then
    local list=(git -C "$root" ls-files -z --cached --others --exclude-standard ':!tests' ':!docs')
    local pack=(tar -C "$root" --ignore-failed-read -czf "$archive" --null -T -)
    if [ -n "$dry_run" ]; then
      echo "$(quoted "${list[@]}") | $(quoted "${pack[@]}")"
    else
      "${list[@]}" | "${pack[@]}"
    fi
  else
    step tar -C "$root" '--exclude=./.venv*' --exclude=./runs \
      --exclude=./tests --exclude=./docs -czf "$archive" .
  fi
  step gcloud compute tpus tpu-vm scp "$archive" "$name:mvc_jax.tgz" --worker=all \
    "${place[@]}" || code=$?
  if [ "$code" = 0 ]; then
    on_workers all "if [ -e $helper ]; then bash $helper idle; fi && rm -rf mvc_jax && mkdir mvc_jax && tar -xzf mvc_jax.tgz -C mvc_jax && bash $helper setup $(quoted "${words[@]}")" ||
      code=$?
  fi
  rm -f "$archive"
  case $code in
    0) ;;
    3)
      refuse "$name" "a machine on which nothing runs" "a run that is at work" \
        "Follow it (logs), or stop it first."
      ;;
    *) return "$code" ;;
  esac
}

# Starts the program on all workers, follows the first, and then waits for the others.
run() {
  local helper='bash mvc_jax/launch/worker.sh'
  local code=0
  on_workers all "$helper start $(quoted "${train[@]}")" || return
  on_workers 0 "$helper follow" || code=$?
  if [ "$code" != "$cut" ]; then  # none may be at work when it is started again
    on_workers all "$helper wait" || code=$((code ? code : $?))
  fi
  return "$code"
}

babysit() {
  local prepared='' now code lost=0 failed=0 unknown=0
  require_shared_workdir
  if [ -n "$dry_run" ]; then create; setup; run; end_of_babysitting 0; fi
  exists=1
  while true; do
    now=$(state)
    case $now in
      ACTIVE) failed=0 ;;
      ABSENT) prepared=; create; arrive || true; continue ;;
      FAILED | SUSPENDED)
        if [ "$now" = FAILED ]; then
          failed=$((failed + 1))
          if [ "$failed" -ge "$failures" ]; then
            refuse "$name" "a machine of type $type" "$failed failed requests: $(reason)" \
              "Choose another --zone or --type."
          fi
        fi
        say "$name: $now; it is made again."
        prepared=
        (cloud queued-resources delete "$name" --force) || exit
        continue
        ;;
      UNKNOWN) unknown=$((unknown + 1)); ask_again "$unknown"; sleep "$poll"; continue ;;
      *) arrive || true; continue ;;
    esac
    unknown=0 code=0
    if [ -z "$prepared" ]; then
      on_workers all 'bash mvc_jax/launch/worker.sh idle' >/dev/null 2>&1 || code=$?
      if [ "$code" = 3 ]; then code=0; else code=0; setup || code=$?; fi
    fi
    if [ "$code" = 0 ]; then
      prepared=1
      run || code=$?
    fi
    case $code in
      0 | 2 | 130) end_of_babysitting "$code" ;;
      "$again") say "the run was stopped and saved; it is resumed."; lost=0 ;;
      *)
        if [ "$(state)" != ACTIVE ]; then lost=0; continue; fi
        lost=$((lost + 1))
        if [ "$code" != "$cut" ] || [ "$lost" -ge "$patience" ]; then
          end_of_babysitting "$code"
        fi
        say "the connection was lost; the run goes on, and is followed again."
        ;;
    esac
    sleep "$poll"
  done
}

# Without one, a new machine would begin at the beginning.
require_shared_workdir() {
  local flag found=
  for flag in ${train[@]+"${train[@]}"}; do
    case $flag in --workdir=* | -workdir=*) found=${flag#*=} ;; esac
  done
  case $found in
    *://* | /*) ;;
    *)
      refuse "--workdir" "a folder that outlives the machine, e.g. gs://BUCKET/FOLDER" \
        "'$found'" "Name one behind --."
      ;;
  esac
}

end_of_babysitting() {
  if [ -z "$dry_run" ]; then say "the run ended with code $1."; fi
  if [ -n "$delete_at_end" ]; then delete; fi
  exit "$1"
}

delete() {
  local now
  if [ -n "$dry_run" ]; then
    cloud queued-resources delete "$name" --force
    return
  fi
  exists=1
  case $(state) in
    ABSENT)
      if [ "$(question tpu-vm 'value(state)')" != ABSENT ]; then
        (cloud tpu-vm delete "$name") || exit
      fi
      ;;
    *) (cloud queued-resources delete "$name" --force) || exit ;;
  esac
  now=$(state)
  if [ "$now" = ABSENT ] && [ "$(question tpu-vm 'value(state)')" = ABSENT ]; then
    exists=
    say "$name is deleted; what its run wrote outside of it, in a bucket for example," \
      "stays and may cost money."
  else
    refuse "$name" "it to be deleted" "the state $now" "Rerun this command."
  fi
}

exists='' archive='' said=$(mktemp)
trap mention EXIT
parse "$@"
case $action in
  create)
    create
    arrive || refuse "$name" "a machine of type $type" "a request that failed: $(reason)" \
      "Delete it and choose another --zone or --type."
    ;;
  setup) exists=1; setup ;;
  run)
    exists=1
    [ ${#train[@]} -gt 0 ] || refuse "run" "flags of mvc_jax.train behind --" "none" \
      "For example: -- --config=configs/cifar100.py --workdir=gs://BUCKET/cifar100"
    run
    ;;
  logs) on_workers "$worker" 'bash mvc_jax/launch/worker.sh follow' ;;
  stop) exists=1; on_workers all 'bash mvc_jax/launch/worker.sh stop' ;;
  babysit) babysit ;;
  delete) delete ;;
esac
