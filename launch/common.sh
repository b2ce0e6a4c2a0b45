# shellcheck shell=bash
# What the launch scripts share. Each sources it first: it takes --dry-run off their arguments.

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi

# Standard output even where a command's output is captured: there a dry run tells what it would do.
exec 3>&1

# fail CODE MESSAGE: one line, and the end.
fail() {
  echo "launch/$(basename "$0"): $2" >&2
  exit "$1"
}

# need NAME EXAMPLE: a setting of the environment that has no default.
need() {
  [[ -n ${!1:-} ]] || fail 2 "$1 is not set; for example: export $1=$2"
}

# check NAME PATTERN MEANING: a setting that has a value has a right one.
check() {
  [[ ${!1} =~ ^($2)$ ]] || fail 2 "$1=${!1} must be $3"
}

tell() {
  printf '%q ' "$@" >&3
  echo >&3
}

do_or_tell() {
  if $dry_run; then
    tell "$@"
  else
    "$@"
  fi
}

# ask ANSWER COMMAND...: what the command prints. A dry run assumes the answer.
ask() {
  local answer=$1
  shift
  if $dry_run; then
    tell "$@"
    echo "$answer"
  else
    "$@"
  fi
}
