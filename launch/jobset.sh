#!/usr/bin/env bash
# Runs the main job on Kubernetes as a JobSet: on TPU slices of GKE, or on nodes with GPUs. It is
# started again after exit code 75 and when pods are taken away, and ends at any other failure.
#
#   launch/jobset.sh [--dry-run] --config=configs/mlip.py --workdir=gs://BUCKET/NAME [flags]
#
# The workdir is in a bucket (gs://, s3://), or below /runs, where a volume is mounted.
#
# Environment:
#   IMAGE        the container image with this package in it: that of docker/tpu.Dockerfile or
#                docker/gpu.Dockerfile
#   CLAIM        the persistent volume claim that is mounted at /runs in every pod; none is needed
#                for a workdir in a bucket
#   DEVICES      tpu or gpu                                              (tpu)
#   ACCELERATOR  tpu: the slice's kind, such as tpu-v6e-slice            (tpu-v5-lite-podslice)
#   TOPOLOGY     tpu: its shape                                          (4x4)
#   SLICES       tpu: how many slices                                    (1)
#   CHIPS        tpu: chips on each host                                 (4)
#   NODES, GPUS  gpu: nodes, and GPUs on each                            (1, 8)
#   GRACE        seconds that a pod has for saving                       (180)
#   JOB_NAME     the JobSet's name                                       (mlip)
#   NAMESPACE    where it goes                                           (default)
#   RESTARTS     how many times to start again                           (100)
set -euo pipefail

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${DEVICES:=tpu}" "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}" "${SLICES:=1}"
: "${CHIPS:=4}" "${NODES:=1}" "${GPUS:=8}" "${GRACE:=180}" "${JOB_NAME:=mlip}"
: "${NAMESPACE:=default}" "${RESTARTS:=100}" "${CLAIM:=}"

if [[ $# -eq 0 ]]; then
  fail 2 "usage: launch/jobset.sh [--dry-run] --config=configs/mlip.py --workdir=gs://BUCKET/NAME [flags]"
fi
need IMAGE us-docker.pkg.dev/my-project/images/mlip
check IMAGE '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "the name of an image"
check DEVICES 'tpu|gpu' "tpu or gpu"
check TOPOLOGY '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "a shape such as 4x4 or 2x2x4"
for setting in SLICES CHIPS NODES GPUS GRACE; do
  check "$setting" '[1-9][0-9]*' "a whole number of at least 1"
done
check RESTARTS '[0-9]+' "a whole number"
if [[ ! " $* " =~ " --workdir="(gs|s3):// ]]; then
  [[ " $* " == *" --workdir=/runs/"* ]] ||
    fail 2 "--workdir=gs://BUCKET/NAME is missing, or --workdir=/runs/NAME, where CLAIM is mounted"
  need CLAIM runs
fi
# shellcheck disable=SC2034 # filled in by its name
if [[ -n $CLAIM ]]; then
  check CLAIM '[a-z0-9]([a-z0-9-]*[a-z0-9])?' "lower-case letters, digits and dashes"
  VOLUME="persistentVolumeClaim: {claimName: \"$CLAIM\"}"
else
  VOLUME="emptyDir: {}"
fi
for setting in ACCELERATOR JOB_NAME NAMESPACE; do
  check "$setting" '[a-z0-9]([a-z0-9-]*[a-z0-9])?' "lower-case letters, digits and dashes"
done

chips=$((${TOPOLOGY//x/ * }))
# shellcheck disable=SC2034 # filled in by its name
HOSTS=$((chips / CHIPS))
((chips % CHIPS == 0)) ||
  fail 2 "TOPOLOGY=$TOPOLOGY has $chips chips, which CHIPS=$CHIPS on each host do not divide"

# The flags as a YAML list. Kubernetes would expand $(NAME) in them; $$ stands for one $.
ARGS=
for flag in "$@"; do
  flag=${flag//\\/\\\\}
  flag=${flag//\"/\\\"}
  flag=${flag//$'\n'/\\n}
  flag=${flag//\$/\$\$}
  ARGS+="${ARGS:+, }\"$flag\""
done
ARGS="[$ARGS]"

manifest=$(<"launch/jobset_$DEVICES.yaml")
# ARGS is last: what the flags hold is not filled in.
for key in JOB_NAME IMAGE VOLUME ACCELERATOR TOPOLOGY SLICES CHIPS HOSTS NODES GPUS GRACE RESTARTS \
  ARGS; do
  manifest=${manifest//"\${$key}"/"${!key}"}
done

apply=(kubectl apply "--namespace=$NAMESPACE" --filename=-)
if $dry_run; then
  printf '%q ' "${apply[@]}"
  printf "<<'END'\n%s\nEND\n" "$manifest"
else
  "${apply[@]}" <<<"$manifest"
fi
