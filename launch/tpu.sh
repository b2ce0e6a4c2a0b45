#!/usr/bin/env bash
# Runs the main job on a TPU slice of Google Cloud, on all its workers at once, and starts it again
# after it was told to stop (exit code 75) or after its spot slice was taken away.
#
#   launch/tpu.sh [--dry-run] create         ask for the slice, wait until it is there
#   launch/tpu.sh [--dry-run] setup          copy this checkout to the workers, install it
#   launch/tpu.sh [--dry-run] run FLAGS      run the main job; again: watch the one that runs
#   launch/tpu.sh [--dry-run] logs           fetch the log of every worker
#   launch/tpu.sh [--dry-run] delete --yes   delete the slice and what is on its disks
#   launch/tpu.sh [--dry-run] all FLAGS      create, setup, run
#
# FLAGS are the main job's. Its --workdir lies where all workers see it: in a bucket, such as
# gs://BUCKET/NAME, or on a shared disk.
#
# Environment:
#   TPU_NAME          what the slice is called
#   PROJECT_ID        whose it is
#   ZONE              where it is, such as us-west4-a
#   ACCELERATOR_TYPE  what it is, such as v5litepod-16 or v6e-16       (needed to create)
#   RUNTIME_VERSION   its image, such as v2-alpha-tpuv5-lite           (needed to create)
#   SPOT              true: cheaper, and may be taken away             (false)
#   PREPARE           a command for every worker after setup, such as one that mounts a disk
#   RESTARTS          how many times to start again                    (100)
#   POLL              seconds between two looks                        (60)
set -euo pipefail

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
usage="usage: launch/tpu.sh [--dry-run] create|setup|run|logs|delete|all [flags of the main job]"
: "${SPOT:=false}" "${RESTARTS:=100}" "${POLL:=60}"
patience=5   # calls over the network that fail in a row before the script gives up
preempted=69 # in place of an exit code, and not one of the job's: the slice was taken away

subcommand=${1:-}
[[ $subcommand =~ ^(create|setup|run|logs|delete|all)$ ]] || fail 2 "$usage"
shift
check SPOT 'true|false' "true or false"
check RESTARTS '[0-9]+' "a whole number"
check POLL '[0-9]+' "a whole number of seconds"
need TPU_NAME mlip
need PROJECT_ID my-project
need ZONE us-west4-a
if [[ $subcommand == create || $subcommand == all || ($subcommand == run && $SPOT == true) ]]; then
  need ACCELERATOR_TYPE v5litepod-16
  need RUNTIME_VERSION v2-alpha-tpuv5-lite
fi
if [[ $subcommand == run || $subcommand == all ]]; then
  [[ " $* " == *" --workdir="* ]] ||
    fail 2 "$subcommand needs --workdir=gs://BUCKET/NAME, or a folder on a disk that all workers see"
elif [[ $subcommand == delete ]]; then
  [[ $* == --yes ]] || fail 2 "delete destroys $TPU_NAME and its disks; if you mean it, add --yes"
elif (($#)); then
  fail 2 "$subcommand takes no flags: $*"
fi

place=("--project=$PROJECT_ID" "--zone=$ZONE")
queue=(gcloud compute tpus queued-resources)
node=(gcloud compute tpus tpu-vm)
ssh=("${node[@]}" ssh "$TPU_NAME" "${place[@]}")
worker=mlip_jax/launch/tpu_worker.sh
folder=runs/tpu/$TPU_NAME

say() {
  echo "$TPU_NAME: $*" >&2
}

pause() {
  $dry_run || sleep "$POLL"
}

patiently() {
  local failed
  for ((failed = 1; ; failed++)); do
    if "$@"; then return; fi
    if ((failed >= patience)); then return 1; fi
    pause
  done
}

request() {
  local tier=()
  if [[ $SPOT == true ]]; then tier=(--spot); fi
  do_or_tell "${queue[@]}" create "$TPU_NAME" "${place[@]}" "--node-id=$TPU_NAME" \
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" \
    ${tier[@]+"${tier[@]}"}
}

delete() {
  do_or_tell "${queue[@]}" delete "$TPU_NAME" "${place[@]}" --force --quiet
}

# state ANSWER: the state of the request; a dry run assumes ANSWER.
state() {
  ask "$1" "${queue[@]}" describe "$TPU_NAME" "${place[@]}" '--format=value(state.state)'
}

create() {
  local now
  now=$(state "" 2>/dev/null) || now= # there is none yet
  if [[ -z $now ]]; then request; fi
  while true; do
    now=$(patiently state ACTIVE) || fail 1 "cannot learn the state of $TPU_NAME"
    case $now in
      ACTIVE) return ;;
      FAILED) fail 1 "the request for $TPU_NAME failed; see: ${queue[*]} describe $TPU_NAME" ;;
      SUSPEND*)
        [[ $SPOT == true ]] || fail 1 "$TPU_NAME is $now; delete it and create it again"
        delete
        request
        ;;
      *)
        say "$now"
        pause
        ;;
    esac
  done
}

setup() {
  local archive=$folder/checkout.tar.gz pack unpack
  # What git knows and what it does not ignore: a config that is not committed yet comes along.
  pack="git ls-files -z --cached --others --exclude-standard"
  pack+=" | tar --create --gzip --null --files-from=- --file=$(printf %q "$archive")"
  unpack="mkdir -p mlip_jax && tar -xzf checkout.tar.gz -C mlip_jax"
  unpack+=" && $worker setup${PREPARE:+ && $PREPARE}"
  do_or_tell mkdir -p "$folder" &&
    do_or_tell bash -o pipefail -c "$pack" &&
    do_or_tell "${node[@]}" scp "$archive" "$TPU_NAME:checkout.tar.gz" "${place[@]}" --worker=all &&
    do_or_tell "${ssh[@]}" --worker=all "--command=$unpack"
}

logs() {
  do_or_tell mkdir -p "$folder"
  # Worker N's output lands in N.log.
  do_or_tell "${ssh[@]}" --worker=all '--command=cat mlip_jax/.job/log' \
    "--output-directory=$folder"
}

# Whether the slice was taken away. A call that fails says nothing.
gone() {
  local now
  now=$(state ACTIVE) || return 1
  if [[ $now == SUSPEND* ]]; then return; fi
  now=$(ask READY "${node[@]}" describe "$TPU_NAME" "${place[@]}" '--format=value(state)') ||
    return 1
  [[ $now == PREEMPTED || $now == TERMINATED ]]
}

# Returns the job's exit code: the first that is neither 0 nor 75, else 75 if any worker's is.
exit_code() {
  local code codes result=0
  codes=$(patiently ask "exit code 0" "${ssh[@]}" --worker=all "--command=$worker code") ||
    codes=
  codes=$(sed -n 's/.*exit code \([0-9][0-9]*\).*/\1/p' <<<"$codes")
  if [[ -z $codes ]]; then
    say "no worker tells how the job ended"
    return 1
  fi
  for code in $codes; do
    if ((code != 0 && code != 75)); then return "$code"; fi
    if ((code == 75)); then result=75; fi
  done
  return "$result"
}

# Starts the job or finds it running; returns its exit code when it ends, or $preempted.
watch() {
  local start failed=0 line code=0
  start="$worker start$(printf ' %q' "$@")"
  until do_or_tell "${ssh[@]}" --worker=all "--command=$start"; do
    if gone; then return "$preempted"; fi
    if ((++failed >= patience)); then fail 1 "cannot start the job on $TPU_NAME"; fi
    pause
  done
  failed=0
  while true; do
    pause
    if gone; then return "$preempted"; fi
    if line=$(ask ended "${ssh[@]}" --worker=0 "--command=$worker look"); then
      failed=0
      if [[ $line == ended ]]; then break; fi
      say "$line"
    elif ((++failed >= patience)); then
      fail 1 "worker 0 of $TPU_NAME does not answer; the job may still run"
    fi
  done
  exit_code || code=$?
  logs || say "could not fetch the logs"
  if ((code != 0 && code != 75)); then
    # Workers that are shut down one after the other can end in any way.
    pause
    if gone; then return "$preempted"; fi
  fi
  return "$code"
}

create_and_setup() {
  create
  until setup; do
    gone || fail 1 "the setup of $TPU_NAME failed"
    delete
    create
  done
}

run() {
  local attempt code
  for ((attempt = 0; ; attempt++)); do
    code=0
    watch "$@" || code=$?
    if ((code == preempted)) && [[ $SPOT != true ]]; then
      fail 1 "$TPU_NAME is no longer there; delete it and create it again"
    fi
    if ((code != preempted && code != 75)) || ((attempt >= RESTARTS)); then
      $dry_run || say "exit code $code; it stays, and costs, until: launch/tpu.sh delete --yes"
      exit "$code"
    fi
    if ((code == preempted)); then
      say "taken away; asking for another ($((attempt + 1)) of $RESTARTS)"
      delete
      create_and_setup
    else
      say "stopped with everything saved; starting again ($((attempt + 1)) of $RESTARTS)"
    fi
  done
}

case $subcommand in
  all)
    create_and_setup
    run "$@"
    ;;
  setup) setup ;;
  *) "$subcommand" "$@" ;;
esac
