# shellcheck shell=bash
# Sourced by the launchers: commands that --dry-run prints, and errors in a sentence.

dry_run=  # not empty: nothing is run

say() {
  echo "launch: $*" >&2
}

# refuse NAME WANTED GOT FIX: ends with exit code 2.
refuse() {
  echo "$1: wanted $2, got $3. $4" >&2
  exit 2
}

# Prints words as they are typed.
quoted() {
  local word text=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%,+-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    text+="${text:+ }$word"
  done
  printf '%s\n' "$text"
}

# step CMD...: runs it, or prints it.
step() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# The launcher's name, as people type it.
launcher() {
  local path
  path=$(readlink -f "$0")
  echo "${path##*/launch/}"
}

# help: the comment at the launcher's top.
help() {
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
  exit 0
}

# common_flag FLAG: one of those that all launchers have, or an error.
common_flag() {
  case $1 in
    --dry-run | --dry_run) dry_run=1 ;;
    -h | --help) help ;;
    *)
      refuse "$1" "a flag of $(launcher), or -- before those of mvc_jax.train" \
        "an unknown one" "Correct it; --help lists them."
      ;;
  esac
}

# require_train EXAMPLE FLAG...: there are flags of mvc_jax.train.
require_train() {
  [ $# -gt 1 ] || refuse "$(launcher)" "flags of mvc_jax.train behind --" "none" \
    "For example: -- $1"
}

# whole NAME VALUE: it is a whole number from 1 on.
whole() {
  case $2 in
    '' | *[!0-9]* | 0*) refuse "$1" "a whole number from 1 on" "'$2'" "Correct it." ;;
  esac
}

# cloud_name NAME VALUE: clouds accept it as the name of a resource.
cloud_name() {
  case $2 in
    [!a-z]* | *[!a-z0-9-]* | *-)
      refuse "$1" "lower-case letters, digits and hyphens" "$2" "Choose another."
      ;;
  esac
}

# need PROGRAM WHERE: it is installed, or the commands are only printed.
need() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null ||
    refuse "$1" "it on the path" "no such program" "$2"
}
