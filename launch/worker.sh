#!/usr/bin/env bash
# One machine's part of a run, which outlives the connection that started it:
#
#   bash launch/worker.sh setup EXTRA...    installs, with these extras of setup.py
#   bash launch/worker.sh start FLAG...     starts mvc_jax.train with these flags
#   bash launch/worker.sh follow            prints its log until it ends
#   bash launch/worker.sh wait              waits for its end
#   bash launch/worker.sh stop              has it save and end
#   bash launch/worker.sh idle              whether nothing runs; the exit code 3: no
#
# `follow`, `wait` and `stop` exit with the program's code, or 137 if it was killed.
# launch/tpu_vm.sh calls this on each worker. Log, process id and exit code are in
# ~/mvc_jax_run, the environment in ~/mvc_jax_env.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
export VENV=${VENV:-$HOME/mvc_jax_env}
# shellcheck source-path=SCRIPTDIR
source "$here/setup_env.sh"
# shellcheck source-path=SCRIPTDIR
source "$here/steps.sh"

run=$HOME/mvc_jax_run
killed=137

# Prints the process id of the program's parent, if it lives.
at_work() {
  local pid
  pid=$(cat "$run/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null &&
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "worker.sh child" &&
    echo "$pid"
}

install_all() {
  local words=("$@")
  if [ -z "${PYTHON:-}" ] && ! (find_python) >/dev/null 2>&1; then
    # Ubuntu 22.04, which the TPU machines have, comes with Python 3.10.
    python3 -m pip install --quiet --user uv ||
      refuse "Python" "pip, to install Python 3.12 with uv" "none" \
        "Install it: sudo apt-get install -y python3-pip"
    PYTHON=$(python3 -m uv python install --quiet 3.12 >&2 &&
      python3 -m uv python find 3.12)
    export PYTHON
  fi
  prepare_env "${words[@]}"
  say "$(hostname): installed in $venv"
}

start() {
  if at_work >/dev/null; then
    [ "$(quoted "$@")" != "$(cat "$run/command")" ] || { say "it runs already"; return; }
    refuse "run" "nothing else at work on $(hostname)" "$(cat "$run/command")" \
      "Let it end, or stop it: bash launch/tpu_vm.sh stop"
  fi
  mkdir -p "$run"
  rm -f "$run/code"
  if [ -e "$run/log" ]; then mv "$run/log" "$run/log.before"; fi
  quoted "$@" >"$run/command"
  : >"$run/log"
  setsid nohup bash "$here/worker.sh" child "$@" >>"$run/log" 2>&1 </dev/null &
  echo "$!" >"$run/pid"
}

# The parent of the program: it stays until it can write the exit code.
child() {
  local code=0
  trap : TERM INT HUP
  cd "$root"
  "$venv/bin/python" -m mvc_jax.train "$@" || code=$?
  echo "$code" >"$run/code.new"
  mv "$run/code.new" "$run/code"
}

# Waits for the end, and exits with the program's code.
await() {
  while at_work >/dev/null; do sleep 0.2; done
  exit "$(cat "$run/code" 2>/dev/null || echo "$killed")"
}

follow() {
  [ -e "$run/log" ] || refuse "log" "a run on $(hostname)" "none" "Start one first."
  tail -n +1 -s 0.2 --pid="$(cat "$run/pid")" -f "$run/log"
  await
}

stop() {
  local pid
  if pid=$(at_work); then kill -TERM -- "-$pid"; fi
  await
}

action=${1:-}
shift || true
case $action in
  setup) install_all "$@" ;;
  start) start "$@" ;;
  child) child "$@" ;;
  follow) follow ;;
  wait) await ;;
  stop) stop ;;
  idle) if at_work >/dev/null; then exit 3; fi ;;
  *) refuse "worker.sh" "setup, start, follow, wait, stop or idle" "'$action'" "Name one." ;;
esac
