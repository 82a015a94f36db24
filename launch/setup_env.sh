# shellcheck shell=bash
# Sourced by the scripts of this folder. `prepare_env [EXTRA...]` creates or repairs the
# virtual environment $venv, installs the package with these extras of setup.py at the
# locked versions, and changes to the repository root. It installs nothing if nothing has
# changed since the last time. Environment variables:
#
#   PYTHON   a CPython >= 3.11 (default: the first one found)
#   VENV     the environment's folder (default: .venv in the repository root)
#   EXTRAS   more extras, for example EXTRAS=cuda or EXTRAS=cuda,caption
#
# Extras are only ever added, so scripts with different ones can share an environment, but
# not those for two versions of CUDA. An environment created here is created again if its
# Python or its path has changed or an installation was interrupted; one created by hand
# is only installed into.

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
if [ -d "$venv" ]; then venv=$(cd -P "$venv" && pwd -P); fi
made=$venv/.mvc_jax_made    # written first into an environment created here
stamp=$venv/.mvc_jax_stamp  # written last: a fingerprint, then one extra a line

fail() {
  echo "launch: $*" >&2
  exit 1
}

# Prints two hashes: of interpreter $1 and the folders (if it changes, the environment
# is created again) and of the requirements (if it changes, they are installed again).
fingerprint() {
  "$1" -I -S -c '
import hashlib, os, sys
assert sys.implementation.name == "cpython" and sys.version_info >= (3, 11)
root, venv = sys.argv[1:3]
python = os.path.realpath(sys._base_executable)
place = (root, venv, python, sys.version_info[:3])
names = "setup.py", *sys.argv[3:]
wanted = [open(os.path.join(root, name), "rb").read() for name in names]
print(*(hashlib.sha256(repr(x).encode()).hexdigest() for x in (place, wanted)))
' "$root" "$venv" "$lock" 2>/dev/null
}

# Prints the extras $1 (one per line) and those that the environment has.
all_extras() {
  (echo "$1"; sed 1d "$stamp" 2>/dev/null || true) | sed '/^$/d' | sort -u
}

# Sets $lock, the file with the versions for the extras $1 (one per line).
choose_lock() {
  local cuda cuda12
  cuda=$(echo "$1" | grep -xE 'cuda|aot-gpu' | head -n 1 || true)
  cuda12=$(echo "$1" | grep -xF cuda12 || true)
  if [ -n "$cuda" ] && [ -n "$cuda12" ]; then
    fail "EXTRAS: wanted one version of CUDA in $venv, got $cuda and cuda12;" \
      "set VENV to a new folder for one of them."
  fi
  lock=requirements${cuda:+-cuda}${cuda12:+-cuda12}.lock
}

# Prints the path of an interpreter that can create an environment.
find_python() {
  local candidate python version found=
  local candidates=(python3.{11..14} python3)  # the lock has wheels for 3.11 to 3.14
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    python=$("$candidate" -I -c '
import ensurepip, sys, venv
assert sys.implementation.name == "cpython" and sys.version_info >= (3, 11)
print(sys._base_executable)
' 2>/dev/null) && [ -x "$python" ] && echo "$python" && return
    command -v "$candidate" >/dev/null || [ -n "${PYTHON:-}" ] || continue
    version=$("$candidate" --version 2>/dev/null | head -n 1 || true)
    found+="${found:+, }$candidate (${version:-does not run})"
  done
  fail "wanted a CPython >= 3.11 with the modules venv and ensurepip, got" \
    "${found:-none}; install one, or set PYTHON to its path."
}

# True if the environment is complete and has the extras $1 (one per line).
env_is_ready() {
  local now
  now=$(fingerprint "$venv/bin/python") || return 1
  [ "$now" = "$(head -n 1 "$stamp" 2>/dev/null)" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$now" = "$(fingerprint "$PYTHON")" ] || return 1
  # shellcheck disable=SC2143  # `grep -q` would find the empty line of no extras
  [ -z "$(echo "$1" | grep -vxF -f "$stamp")" ]
}

# True if the environment, complete or not, can be installed into.
env_is_sound() {
  local now
  [ -e "$venv/pyvenv.cfg" ] && now=$(fingerprint "$venv/bin/python") || return 1
  [ -z "${PYTHON:-}" ] || [ "$now" = "$(fingerprint "$PYTHON")" ] || return 1
  if [ -e "$stamp" ]; then
    [ "${now% *}" = "$(head -n 1 "$stamp" | cut -d ' ' -f 1)" ]
  else
    [ ! -e "$made" ]
  fi
}

make_env() {
  local python
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$made" ] &&
    [ "$venv" != "$root/.venv" ]; then
    fail "VENV: wanted a new folder or a working virtual environment, got $venv;" \
      "choose another."
  fi
  python=$(find_python)
  mkdir -p "$venv"
  touch "$made"
  find "$venv" -mindepth 1 ! -name "${made##*/}" -delete
  echo '*' >"$venv/.gitignore"
  "$python" -m venv "$venv"
}

install_env() {
  local extras=$1 quiet='' names
  extras=$(all_extras "$extras")
  if ! env_is_sound; then make_env; fi
  echo "launch: installing into $venv; this can take minutes." >&2
  rm -f "$stamp"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$venv/bin/python" -m ensurepip >&2
  if [ ! -t 2 ]; then quiet=--quiet; fi
  names=$(echo "$extras" | paste -s -d , -)
  cd "$root" || exit
  "$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
    -c "$lock" -e ".${names:+[$names]}" >&2
  (fingerprint "$venv/bin/python"; echo "$extras") >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

prepare_env() {
  local extra extras
  extras=$(printf '%s\n' "$@" "${EXTRAS:-}" | tr ', ' '[\n*]' | sed '/^$/d' | sort -u)
  for extra in $extras; do
    grep -qF "    \"$extra\": [" "$root/setup.py" ||
      fail "EXTRAS: wanted names of extras in setup.py, got $extra; correct it."
  done
  choose_lock "$(all_extras "$extras")"
  if ! env_is_ready "$extras"; then
    exec 9<"$root"  # scripts started at once take turns
    if command -v flock >/dev/null; then
      flock -n 9 || { echo "launch: waiting for another installation." >&2; flock 9; }
    fi
    choose_lock "$(all_extras "$extras")"
    if ! env_is_ready "$extras"; then install_env "$extras"; fi
    exec 9<&-
  fi
  cd "$root" || exit
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}
