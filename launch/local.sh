#!/usr/bin/env bash
# Runs the main job on this host, in an environment of its own, and starts it again after it was
# told to stop (exit code 75: everything is saved, and the same command goes on).
#
#   launch/local.sh [--dry-run] --config=configs/mlip.py [flags of the main job]
#
# Environment:
#   VENV      where the environment lies or is made      (.venv)
#   EXTRAS    extras to install, such as gpu or tpu      (none)
#   RESTARTS  how many times to start again              (10)
set -euo pipefail

cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
package=.${EXTRAS:+[$EXTRAS]}
restarts=${RESTARTS:-10}
dry_run=false

if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if [[ $# -eq 0 ]]; then
  echo "usage: launch/local.sh [--dry-run] --config=configs/mlip.py [flags]" >&2
  exit 2
fi

do_or_tell() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if [[ ! -x $venv/bin/python ]]; then
  do_or_tell python3 -m venv "$venv"
  do_or_tell "$venv/bin/python" -m pip install --quiet --editable "$package"
fi

for ((attempt = 0; ; attempt++)); do
  code=0
  do_or_tell "$venv/bin/python" -m mlip_jax.main "$@" || code=$?
  if ((code != 75 || attempt >= restarts)); then
    exit "$code"
  fi
  echo "stopped with everything saved; starting again ($((attempt + 1)) of $restarts)" >&2
done
