#!/usr/bin/env bash
# Submits the main job to SLURM, one process for each GPU, and puts it back into the queue after it
# was told to stop (exit code 75). Submitting the same command again resumes as well.
#
#   launch/slurm.sh [--dry-run] --config=configs/mlip.py [flags of the main job]
#
# Environment:
#   NODES     nodes                                                       (1)
#   GPUS      GPUs on each node                                           (8)
#   CPUS      CPU cores for each GPU                                      (8)
#   LIMIT     time limit of one stretch, as --time takes it               (24:00:00)
#   GRACE     seconds before the limit at which the job is told to stop   (180)
#   JOB_NAME  the job's name                                              (mlip)
#   RESTARTS  how many times to start again                               (100)
#   VENV      where the environment lies or is made, seen by all nodes    (.venv)
#   EXTRAS    extras to install                                           (gpu)
# and sbatch's own: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_CONSTRAINT, ...
set -euo pipefail

cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${NODES:=1}" "${GPUS:=8}" "${CPUS:=8}" "${LIMIT:=24:00:00}" "${GRACE:=180}" "${JOB_NAME:=mlip}"
: "${RESTARTS:=100}" "${VENV:=.venv}" "${EXTRAS:=gpu}"
logs=runs/slurm

if [[ $# -eq 0 ]]; then
  fail 2 "usage: launch/slurm.sh [--dry-run] --config=configs/mlip.py [flags]"
fi
for setting in NODES GPUS CPUS GRACE; do
  check "$setting" '[1-9][0-9]*' "a whole number of at least 1"
done
check RESTARTS '[0-9]+' "a whole number"
check LIMIT '[0-9]+([:-][0-9]+)*' "a time such as 24:00:00 or 2-00:00:00"
check JOB_NAME '[A-Za-z0-9._-]+' "letters, digits, dots, dashes"

# JAX finds its processes by SLURM's variables and gives each the GPU of its local rank, so each
# must see all GPUs of its node. Saving takes longer in one process than in another: none is killed
# because another has ended, and what hangs is killed after ten minutes.
script() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$JOB_NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --cpus-per-task=$CPUS
#SBATCH --time=$LIMIT
#SBATCH --signal=TERM@$GRACE
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$logs/%x-%j.log
set -euo pipefail
code=0
srun --gpu-bind=none --cpus-per-task=$CPUS --kill-on-bad-exit=0 --wait=600 \\
  --open-mode=append --output=$logs/%x-%j-%t.log \\
  $(printf '%q ' "$VENV/bin/python" -m mlip_jax.main "$@")|| code=\$?
if ((code == 75 && \${SLURM_RESTART_COUNT:-0} < $RESTARTS)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
}

if [[ ! -x $VENV/bin/python ]]; then
  do_or_tell python3 -m venv "$VENV"
  do_or_tell "$VENV/bin/python" -m pip install --quiet --editable ".[$EXTRAS]"
fi
do_or_tell mkdir -p "$logs" # SLURM makes none, and loses the output
if $dry_run; then
  echo "sbatch <<'END'"
  script "$@"
  echo END
else
  script "$@" | sbatch
fi
