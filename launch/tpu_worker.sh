#!/usr/bin/env bash
# What launch/tpu.sh asks of one worker of a slice, in the checkout that lies there.
#
#   launch/tpu_worker.sh setup         make the environment
#   launch/tpu_worker.sh start FLAGS   start the main job in the background, unless it runs
#   launch/tpu_worker.sh look          print "ended", or the last line of its log
#   launch/tpu_worker.sh code          print "exit code N" when it has ended
#
# Environment:
#   PATIENCE  seconds that code waits for the end, before it says 124   (600)
set -euo pipefail

cd "$(dirname "$0")/.."
python=.venv/bin/python
job=.job # the job's process, exit code and log
mkdir -p "$job"

running() {
  [[ -s $job/pid && ! -s $job/code ]] && kill -0 "$(<"$job/pid")" 2>/dev/null
}

case ${1:-} in
  setup)
    # The TPU images' own Python is older than the package needs; uv brings one.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python "$python" --editable '.[tpu,gcs]'
    ;;
  start)
    if running; then
      echo "the job runs already"
      exit
    fi
    shift
    rm -f "$job/code"
    # A host that shuts down signals this shell as well; it stays until the job has saved.
    # shellcheck disable=SC2016
    nohup bash -c 'trap : TERM; "$@"; echo $? >.job/code' job "$python" -m mlip_jax.main "$@" \
      >>"$job/log" 2>&1 </dev/null &
    echo $! >"$job/pid"
    ;;
  look)
    if running; then
      tail -n 1 "$job/log"
    else
      echo ended
    fi
    ;;
  code)
    end=$((SECONDS + ${PATIENCE:-600}))
    while running; do
      if ((SECONDS >= end)); then
        echo "exit code 124"
        exit
      fi
      sleep 1
    done
    # Nothing was written when the host itself went down.
    echo "exit code $(cat "$job/code" 2>/dev/null || echo 137)"
    ;;
  *)
    echo "usage: launch/tpu_worker.sh setup|start|look|code [flags]" >&2
    exit 2
    ;;
esac
